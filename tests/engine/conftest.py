"""Tests of the engine run over a stub that waits for the host's sampler and over one that samples ahead."""

import engine_helpers
import pytest

from polybatch.execution.fake import FakeAheadExecutor, FakeExecutor


@pytest.fixture(params=[FakeExecutor, FakeAheadExecutor], ids=["sync", "ahead"])
def stub(request, monkeypatch):
    """The kind of stub that `make_core` builds in this test."""
    monkeypatch.setattr(engine_helpers, "STUBS", [request.param])
    return request.param
