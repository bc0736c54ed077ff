"""What `batch` and `chat` do with --server: the same, through a server."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec

from polybatch.cli.options import EngineOptions
from polybatch.errors import ConfigError, RequestError
from polybatch.jobs.job import Job, open_job
from polybatch.jobs.results import Progress
from polybatch.request import SamplingParams

KEY_VARIABLES = ("POLYBATCH_API_KEY", "VLLM_API_KEY")


def api_key_of(given: str | None) -> str | None:
    """The key to send: as given, or from the environment."""
    return given or next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)


def refuse_engine_flags(engine: EngineOptions, allowed: Sequence[str] = ()) -> None:
    """Raise ConfigError for a flag of an engine that is not here."""
    for field in fields(engine):
        if field.name not in allowed and getattr(engine, field.name) != field.default:
            flag = "model" if field.name == "model_name" else field.name.replace("_", "-")
            raise ConfigError(f"--{flag} is for an engine of one's own: leave it out beside --server")


def run_batch(
    url: str,
    api_key: str | None,
    source: Path,
    output: Path,
    *,
    resume: bool,
    overwrite: bool,
    concurrency: int,
    begun: Callable[[Job], None],
    report: Callable[[Progress], None],
) -> tuple[Progress, int | None]:
    """Have a server answer a file; returns the progress and the signal that stopped it, if one did.

    begun: called once the job is open. Raises ConfigError or EngineError.
    """
    from polybatch.jobs.remote import RemoteAnswerer, client_of, server_url
    from polybatch.jobs.rows import Io, RowRunner

    facts = {"server": server_url(url)}

    async def run(io: Io) -> tuple[Progress, int | None]:
        job = await io(lambda: open_job(
            source, output, facts, resume=resume, overwrite=overwrite, is_served=True
        ))  # fmt: skip
        received: list[int] = []
        try:
            await io(begun, job)
            async with client_of(url, api_key, concurrency) as client:
                slots = asyncio.Semaphore(concurrency)
                runner = await io(RowRunner, job, RemoteAnswerer(client), slots, io, report)
                working = asyncio.create_task(runner.run())

                def stop(number: int) -> None:
                    received.append(number)
                    working.cancel()

                for number in (signal.SIGINT, signal.SIGTERM):
                    asyncio.get_running_loop().add_signal_handler(number, stop, number)
                await asyncio.wait((working,))
            if not working.cancelled():
                working.result()
        finally:
            await io(job.close)
        unfinished = runner.progress.done < runner.progress.total
        return runner.progress, received[0] if received and unfinished else None

    with ThreadPoolExecutor(1) as pool:
        return asyncio.run(run(Io(pool)))


class RemoteModel:
    """Answers of a server's model, as `polybatch.cli.chat.Answers`.

    model: its name there; None for the first that the server lists. Raises ConfigError if it does not answer.
    """

    def __init__(self, url: str, api_key: str | None, model: str | None, params: SamplingParams) -> None:
        import httpx

        from polybatch.jobs.remote import key_header, server_url

        self._client = httpx.Client(
            base_url=server_url(url), headers=key_header(api_key), timeout=httpx.Timeout(600, connect=10)
        )
        self._params = params
        try:
            response = self._client.get("/v1/models")
            listed = response.json()["data"] if response.status_code == 200 else None
        except (httpx.TransportError, ValueError, KeyError) as error:
            self._client.close()
            raise ConfigError(f"--server {url} does not answer: {error}") from error
        if not listed:
            self._client.close()
            said = _message(response.text) or response.text[:200]
            raise ConfigError(f"--server {url} says {response.status_code} to /v1/models: {said}")
        self.model: str = model or listed[0]["id"]
        self.adapters = tuple(str(entry["id"]) for entry in listed if entry.get("parent"))

    def close(self) -> None:
        self._client.close()

    def __call__(self, messages: Sequence[dict[str, str]], adapter: str | None) -> Generator[str, None, None]:
        """Pieces of the answer. Raises RequestError."""
        import httpx

        params = self._params
        body: dict[str, Any] = {
            "model": adapter or self.model,
            "messages": list(messages),
            "stream": True,
            "temperature": params.temperature,
            "top_p": params.top_p,
        }
        if params.max_tokens is not None:
            body["max_tokens"] = params.max_tokens
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise RequestError(_message(response.text) or f"status {response.status_code}")
                yield from _pieces(response.iter_lines())
        except httpx.TransportError as error:
            raise RequestError(f"the server does not answer: {error}") from error


def _pieces(lines: Iterator[str]) -> Iterator[str]:
    """Texts of a stream of server-sent events. Raises RequestError for an event that tells of one."""
    for line in lines:
        data = line.removeprefix("data:").strip()
        if data == line or data == "[DONE]":
            continue
        if message := _message(data):
            raise RequestError(message)
        for choice in msgspec.json.decode(data).get("choices", ()):
            if text := choice.get("delta", {}).get("content"):
                yield text


def _message(text: str) -> str | None:
    """The message of an error object, if it is one."""
    try:
        error = msgspec.json.decode(text).get("error")
    except (msgspec.DecodeError, AttributeError):
        return None
    return str(error.get("message")) if isinstance(error, dict) else None
