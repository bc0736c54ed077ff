"""Mixed traffic, good and bad: every kind of request that a server sees, some by clients that leave.

Each kind is a coroutine that sends one thing, checks what comes back and raises `UnexpectedAnswerError` if
that is not what was to come. Kinds are drawn by weight from one seeded generator per worker.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx

API_KEY, ADMIN_KEY = "soak-client", "soak-admin"
ANSWER_LIMIT_S = 300.0
"""A live client that waits longer hangs. Far above any queue that this traffic makes."""

BATCH_WINDOW, BATCH_LIMIT_S = "10m", 630.0
"""Rows have only what live traffic leaves, which may be nothing until their window nears its end."""


WORDS = ("river", "stone", "quiet", "market", "seven", "letters", "winter", "garden", "copper", "signal")
OK, BAD_REQUESTS = (200,), (400, 404, 413, 422)


class UnexpectedAnswerError(Exception):
    """An answer that the request should not have had."""


class Traffic:
    """A client and its counts. adapters: names that requests may choose; spare: folder of one that comes
    and goes.

    num_done, num_tokens: by kind; a kind is counted once it came back as it should.
    """

    def __init__(self, url: str, model: str, adapters: list[str], spare: Path, seed: int) -> None:
        self.model, self.adapters, self.spare = model, adapters, spare
        self.random = random.Random(seed)
        self.num_done: Counter[str] = Counter()
        self.num_tokens = 0
        self.max_wait_s = 0.0
        self.failures: list[str] = []
        headers = {"Authorization": f"Bearer {API_KEY}"}
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=50)
        self.http = httpx.AsyncClient(base_url=url, headers=headers, timeout=None, limits=limits)
        self._spares = 0
        self._kinds: dict[str, tuple[int, Callable[[], Awaitable[None]]]] = {
            "chat": (14, self.chat),
            "chat_streamed": (14, self.chat_streamed),
            "completion": (14, self.completion),
            "several": (6, self.several),
            "left_while_streaming": (12, self.left_while_streaming),
            "left_before_answer": (6, self.left_before_answer),
            "form": (10, self.form),
            "malformed": (14, self.malformed),
            "garbage": (4, self.garbage),
            "looks": (4, self.looks),
            "batch": (1, self.batch),
            "spare_adapter": (1, self.spare_adapter),
        }

    async def work(self, until_s: float) -> None:
        """Send one thing after another until a time of `time.monotonic`."""
        names = list(self._kinds)
        weights = [weight for weight, _ in self._kinds.values()]
        while time.monotonic() < until_s:
            name = self.random.choices(names, weights)[0]
            started = time.monotonic()
            try:
                async with asyncio.timeout(BATCH_LIMIT_S if name == "batch" else ANSWER_LIMIT_S):
                    await self._kinds[name][1]()
            except TimeoutError:
                self.failures.append(f"{name}: no answer in time")
            except (UnexpectedAnswerError, httpx.HTTPError, OSError, ValueError, KeyError) as error:
                self.failures.append(f"{name}: {type(error).__name__}: {error}")
            else:
                self.num_done[name] += 1
            if name != "batch":
                self.max_wait_s = max(self.max_wait_s, time.monotonic() - started)

    def _prompt(self) -> str:
        return " ".join(self.random.choices(WORDS, k=self.random.randint(3, 60)))

    def _body(self, **fields: Any) -> dict[str, Any]:
        """Of a completion; half of them with an adapter, half greedy."""
        model = self.random.choice([self.model, *self.adapters]) if self.adapters else self.model
        temperature = self.random.choice([0, 0.8])
        body = {"model": model, "max_tokens": self.random.randint(1, 40), "temperature": temperature}
        return body | fields

    def _chat_body(self, **fields: Any) -> dict[str, Any]:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": self._prompt()}]
        return self._body(**({"messages": messages} | fields))

    async def _post(self, path: str, body: Any, expected: tuple[int, ...] = OK, **options: Any) -> Any:
        response = await self.http.post(path, json=body, **options)
        _check(response.status_code in expected, f"{path}: {response.status_code} {response.text[:300]}")
        answer = response.json()
        _check(("error" in answer) == (response.status_code != OK[0]), f"{path}: {response.text[:300]}")
        if "usage" in answer:
            self.num_tokens += answer["usage"]["completion_tokens"]
        return answer

    async def chat(self) -> None:
        answer = await self._post("/v1/chat/completions", self._chat_body())
        _check(isinstance(answer["choices"][0]["message"]["content"], str), "a message without content")

    async def chat_streamed(self) -> None:
        body = self._chat_body(stream=True, stream_options={"include_usage": True})
        async with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = [line async for line in response.aiter_lines() if line]
        _check(
            response.status_code == OK[0] and lines[-1] == "data: [DONE]", f"a stream ended with {lines[-1:]}"
        )
        usage = json.loads(lines[-2].removeprefix("data: "))["usage"]
        self.num_tokens += usage["completion_tokens"]

    async def completion(self) -> None:
        await self._post("/v1/completions", self._body(prompt=self._prompt(), stop=["river"]))

    async def several(self) -> None:
        prompts = [self._prompt() for _ in range(2)]
        answer = await self._post(
            "/v1/completions", self._body(prompt=prompts, n=2, logprobs=3, echo=self.random.random() < 0.5)
        )
        _check(len(answer["choices"]) == 4, "not every prompt was answered n times")

    async def left_while_streaming(self) -> None:
        body = self._body(prompt=self._prompt(), stream=True, max_tokens=200, ignore_eos=True)
        stay = self.random.randint(1, 20)
        async with self.http.stream("POST", "/v1/completions", json=body) as response:
            _check(response.status_code == OK[0], f"a stream began with {response.status_code}")
            async for line in response.aiter_lines():
                stay -= bool(line)
                if stay <= 0:
                    break

    async def left_before_answer(self) -> None:
        body = self._body(prompt=self._prompt(), max_tokens=200, ignore_eos=True)
        try:
            await self.http.post("/v1/completions", json=body, timeout=self.random.uniform(0.01, 1.0))
        except httpx.TimeoutException:
            return

    async def form(self) -> None:
        """Half of the forms are ones that the server has not seen yet."""
        name = self.random.choice(["age", "size", f"field_{self.random.getrandbits(32)}"])
        schema = {"type": "object", "properties": {name: {"type": "integer"}}, "required": [name]}
        shape: dict[str, Any] = self.random.choice(
            [
                {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
                {"structured_outputs": {"choice": ["yes", "no", name]}},
                {"structured_outputs": {"regex": f"({name}|[a-z]{{3}}) [0-9]{{2}}"}},
                {"response_format": {"type": "json_object"}},
            ]
        )
        await self._post("/v1/chat/completions", self._chat_body(**shape))

    async def malformed(self) -> None:
        wrong: list[tuple[str, Any]] = [
            ("/v1/completions", self._body(prompt="x", max_tokens=-1)),
            ("/v1/completions", self._body(prompt="x", temperature="hot")),
            ("/v1/completions", self._body(prompt={"text": "x"})),
            ("/v1/completions", self._body(prompt=[[1, 2], "x"])),
            ("/v1/completions", self._body(prompt="x", no_such_field=1)),
            ("/v1/completions", self._body(prompt="x " * 3000)),
            ("/v1/completions", self._body(prompt="x") | {"model": "no-such-model"}),
            ("/v1/completions", self._body(prompt="x", n=10_000)),
            ("/v1/chat/completions", self._chat_body(messages="hello")),
            ("/v1/chat/completions", self._chat_body(messages=[{"role": "user", "content": {"a": 1}}])),
            ("/v1/chat/completions", self._chat_body(structured_outputs={"regex": "("})),
            ("/v1/batches", {"input_file_id": "file-none", "endpoint": "/v1/completions"}),
            ("/v1/completions", []),
            ("/v1/completions", "x"),
        ]  # fmt: skip
        path, body = self.random.choice(wrong)
        await self._post(path, body, BAD_REQUESTS)

    async def garbage(self) -> None:
        """Bytes that are no JSON, no HTTP, or stop halfway."""
        kind = self.random.randrange(3)
        if kind == 0:
            response = await self.http.post("/v1/completions", content=self.random.randbytes(200))
            _check(response.status_code in BAD_REQUESTS, f"garbage was answered with {response.status_code}")
            return
        url = self.http.base_url
        _, writer = await asyncio.open_connection(url.host, url.port)
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
        writer.write(head if kind == 1 else self.random.randbytes(100))
        await writer.drain()
        writer.close()

    async def looks(self) -> None:
        """What operators' tools ask for; /metrics is not for clients."""
        path = self.random.choice(["/v1/models", "/ready", "/openapi.json", "/metrics"])
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"} if path == "/metrics" else {}
        response = await self.http.get(path, headers=headers)
        _check(response.status_code == OK[0], f"{path}: {response.status_code}")

    async def batch(self) -> None:
        """A file of rows, one of them wrong, seen through to its answers and away again."""
        bodies = [self._body(prompt=self._prompt(), max_tokens=8) for _ in range(4)] + [{"model": "none"}]
        rows = [
            json.dumps({"custom_id": f"{i}", "method": "POST", "url": "/v1/completions", "body": body})
            for i, body in enumerate(bodies)
        ]
        upload = await self.http.post(
            "/v1/files", files={"file": ("in.jsonl", "\n".join(rows).encode())}, data={"purpose": "batch"}
        )
        _check(upload.status_code == OK[0], f"upload: {upload.status_code} {upload.text[:300]}")
        source = upload.json()["id"]
        task = {"input_file_id": source, "endpoint": "/v1/completions", "completion_window": BATCH_WINDOW}
        batch = await self._post("/v1/batches", task)
        while batch["status"] in ("validating", "in_progress", "finalizing"):
            await asyncio.sleep(0.5)
            batch = (await self.http.get(f"/v1/batches/{batch['id']}")).json()
        counts = batch["request_counts"]
        _check(
            batch["status"] == "completed" and counts["completed"] == 4 and counts["failed"] == 1, f"{batch}"
        )
        answers = await self.http.get(f"/v1/files/{batch['output_file_id']}/content")
        _check(len(answers.text.strip().split("\n")) == 4, "a row has no answer")
        for file in (source, batch["output_file_id"], batch["error_file_id"]):
            gone = await self.http.delete(f"/v1/files/{file}")
            _check(gone.status_code == OK[0], f"delete: {gone.status_code} {gone.text[:300]}")

    async def spare_adapter(self) -> None:
        """Load an adapter, use it, forget it."""
        self._spares += 1
        name = f"spare-{id(self)}-{self._spares % 3}"
        admin = {"Authorization": f"Bearer {ADMIN_KEY}"}
        for path, body in (
            ("load", {"lora_name": name, "lora_path": str(self.spare)}), ("unload", {"lora_name": name}),
        ):  # fmt: skip
            response = await self.http.post(f"/v1/{path}_lora_adapter", json=body, headers=admin)
            _check(response.status_code == OK[0], f"{path}: {response.status_code} {response.text[:300]}")
            if path == "load":
                await self._post("/v1/completions", self._body(prompt=self._prompt()) | {"model": name})


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UnexpectedAnswerError(message)
