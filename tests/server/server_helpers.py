"""A real server over the stub engine: uvicorn in a thread of this process, the engine in its own process."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import uvloop

from polybatch.engine.async_llm import AsyncLLM
from polybatch.engine.connection import Watch
from polybatch.server.config import ServerConfig
from polybatch.server.run import DrainingServer
from polybatch.server.state import ServerState

T = TypeVar("T")

START_S = 240.0
"""For a machine that does much else."""

FAST = Watch(heartbeat_s=0.1, silence_s=2.0, stall_s=30.0, backoff_s=0.05, stop_s=5.0)


class RunningServer:
    """A context manager; `client` speaks HTTP to it, `openai` OpenAI's language."""

    def __init__(
        self,
        model: str = "stub",
        adapters: dict[str, str | Path] | None = None,
        *,
        watch: Watch = FAST,
        config: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.llm = AsyncLLM(model, adapters, watch=watch, **({"max_model_len": 1000} | settings))
        self._config = ServerConfig(**({"served_model_names": ("base",), "port": 0} | (config or {})))
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._loop: asyncio.AbstractEventLoop
        self.state: ServerState
        self.server: DrainingServer
        self.url = ""

    def _run(self) -> None:
        try:
            uvloop.run(self._serve())
        except BaseException as error:
            self._error = error
            self._started.set()
            raise

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with self.llm:
            self.state = ServerState.create(self.llm, self._config)
            self.server = DrainingServer(self.state)
            serving = asyncio.create_task(self.server.serve())
            while not self.server.started:
                await asyncio.sleep(0.01)
            self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
            self._started.set()
            await serving

    def __enter__(self) -> RunningServer:
        self._thread.start()
        assert self._started.wait(START_S), "the server did not start in time"
        if self._error is not None:
            raise self._error
        self.client = httpx.Client(base_url=self.url, timeout=60)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.openai.close()
        self.server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Have the server's event loop do something."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def complete(self, **body: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json={"model": "base", "prompt": "hi"} | body)

    def until_idle(self) -> None:
        """Wait until the front has nothing in flight."""
        self.run(asyncio.wait_for(self.llm.wait_idle(), 30))


def events(response: httpx.Response) -> list[Any]:
    """Payloads of a stream, `[DONE]` checked and left out."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
