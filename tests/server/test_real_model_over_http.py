"""The demo's model behind the server answers as in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
from server_helpers import RunningServer

from polybatch.engine.connection import Watch
from polybatch.engine.llm import LLM
from polybatch.request import SamplingParams

ADAPTERS = Path(__file__).parents[2] / "examples" / "adapters"
MESSAGES = [{"role": "user", "content": "Name the capital of France in one word."}]


@pytest.fixture(scope="module")
def served(real_model: Path) -> RunningServer:
    return RunningServer(
        str(real_model), {"sentiment": ADAPTERS / "sentiment"}, watch=Watch(), max_model_len=512,
        memory="64MiB", threads=1,
    )  # fmt: skip


def test_the_real_model_says_the_same_over_http(real_model: Path, served: RunningServer) -> None:
    params = SamplingParams(temperature=0, max_tokens=8)
    settings = {"max_model_len": 512, "memory": "64MiB", "threads": 1}
    with LLM(str(real_model), {"sentiment": ADAPTERS / "sentiment"}, **settings) as llm:  # type: ignore[arg-type]
        outputs = llm.chat([MESSAGES] * 2, params, adapter=[None, "sentiment"])
    expected = [output.outputs[0].text for output in outputs]
    with served as server:
        for model, text in zip(("base", "sentiment"), expected, strict=True):
            body = {"model": model, "messages": MESSAGES, "temperature": 0, "max_tokens": 8}
            whole = server.openai.chat.completions.create(**body)  # type: ignore[call-overload]
            assert whole.choices[0].message.content == text
            stream = server.openai.chat.completions.create(**body, stream=True)  # type: ignore[call-overload]
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text
        stats = server.run(server.llm.stats())
        assert stats.scheduler.num_resident_adapters == 1
