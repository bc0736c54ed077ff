"""The status line and the log's formats."""

from __future__ import annotations

import asyncio
import json
import logging
import sys

import msgspec
import pytest

from polybatch.engine.core import EngineCore
from polybatch.engine.snapshot import EngineSnapshot, take_snapshot
from polybatch.engine.stub import stub_core
from polybatch.log_format import JsonFormatter
from polybatch.request import SamplingParams
from polybatch.server.logs import report_status, status_line


def snapshot_at(core: EngineCore, at_s: float) -> EngineSnapshot:
    return msgspec.structs.replace(take_snapshot(core, -1), at_s=at_s)


def test_the_status_line_tells_rates_and_shares() -> None:
    core = stub_core("stub:num_pages=10")
    before = snapshot_at(core, 100.0)
    for name in ("one", "two"):
        core.add_request(name, list(range(40)), SamplingParams(max_tokens=50, ignore_eos=True))
    for _ in range(5):
        core.step()
    line = status_line(before, snapshot_at(core, 102.0))
    assert line == "running 2, waiting 0, 24 tok/s in, 4 out, KV 40 %, prefix hits 40 %"


def test_the_status_line_is_silent_while_nothing_happens() -> None:
    core = stub_core()
    core.add_request("one", [1, 2], SamplingParams(max_tokens=2, ignore_eos=True))
    while core.has_work():
        core.step()
    assert status_line(snapshot_at(core, 1.0), snapshot_at(core, 11.0)) is None


class OneView:
    """Snapshots from a list; the engine process restarts before the last."""

    def __init__(self, snapshots: list[EngineSnapshot | None]) -> None:
        self._snapshots = snapshots
        self.life = 0

    async def look(self) -> EngineSnapshot | None:
        if not self._snapshots:
            raise asyncio.CancelledError
        if len(self._snapshots) == 1:
            self.life += 1
        return self._snapshots.pop(0)


def test_nothing_is_said_across_a_restart(caplog: pytest.LogCaptureFixture) -> None:
    core = stub_core()
    core.add_request("one", [1, 2], SamplingParams(max_tokens=20, ignore_eos=True))
    snapshots: list[EngineSnapshot | None] = [snapshot_at(core, 0.0)]
    for at_s in (1.0, 2.0):
        core.step()
        snapshots.append(snapshot_at(core, at_s))
    with caplog.at_level(logging.INFO, "polybatch.server"), pytest.raises(asyncio.CancelledError):
        asyncio.run(report_status(OneView(snapshots), 0.0))  # type: ignore[arg-type]
    assert len(caplog.records) == 1


def test_json_lines_hold_message_and_exception() -> None:
    try:
        raise ValueError("bad\nnews")
    except ValueError:
        record = logging.LogRecord("polybatch.x", 40, "f", 1, "it is %s\n", ("over",), sys.exc_info())
    line = JsonFormatter().format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert (found["level"], found["logger"], found["message"]) == ("error", "polybatch.x", "it is over\n")
    assert "ValueError: bad" in found["exception"]
    assert found["time"].endswith("Z")
