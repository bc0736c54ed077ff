"""A batch behind its window, on the real engine and model: rows take turns with live requests."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from batch_helpers import begin, grow_old, lines_of, row, until
from server_helpers import RunningServer

from polybatch.engine.connection import Watch

GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
PROMPTS = ["The capital of France is", "Two and two are", "Water boils at"]
NUM_LIVE, NUM_SEQS = 5, 2


class LiveTraffic:
    """More clients than can run at once, each with its next request as soon as one has ended."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(NUM_LIVE)]
        self.lengths: list[int] = []
        self.failures: list[str] = []

    def _ask(self) -> None:
        while not self._is_over.is_set():
            answer = self._server.complete(prompt="Once upon a time", **(GREEDY | {"max_tokens": 24}))
            if answer.status_code == 200:
                self.lengths.append(answer.json()["usage"]["completion_tokens"])
            else:
                self.failures.append(answer.text)

    def __enter__(self) -> LiveTraffic:
        for thread in self._threads:
            thread.start()
        end = time.monotonic() + 60
        while self._server.state.admission.num_queued_seqs == 0:
            assert time.monotonic() < end, "live requests never had to wait"
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(60)


def test_rows_of_a_batch_that_is_behind_are_answered_among_live_requests_and_as_these_are(
    real_model: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"max_model_len": 256, "memory": "64MiB", "threads": 1}
    with RunningServer(
        str(real_model), watch=Watch(), config={"data_dir": tmp_path}, max_num_seqs=NUM_SEQS, **settings
    ) as server:
        alone = [server.complete(prompt=prompt, **GREEDY).json()["choices"][0]["text"] for prompt in PROMPTS]
        with LiveTraffic(server) as live:
            made = begin(server.openai, [row(f"r{i}", prompt, **GREEDY) for i, prompt in enumerate(PROMPTS)])
            until(server.openai, made.id, "in_progress")
            seen = len(live.lengths)
            while len(live.lengths) < seen + NUM_LIVE:
                time.sleep(0.02)
            counts = server.openai.batches.retrieve(made.id).request_counts
            assert counts is not None
            assert counts.completed == 0, "live requests go first while the batch has time"
            before = len(live.lengths)
            grow_old(server, made.id)
            done = until(server.openai, made.id, limit_s=120)
            after = len(live.lengths)
        assert done.status == "completed"
        assert after > before, "live requests are answered beside"
        assert not live.failures
        assert set(live.lengths) == {24}
        rows = lines_of(server.openai, done.output_file_id)
        texts = [rows[f"r{i}"]["response"]["body"]["choices"][0]["text"] for i in range(len(PROMPTS))]
        assert texts == alone
        server.until_idle()
        service = server.state.batches
        assert service is not None
        assert (service.capacity.num_in_flight, service.capacity.num_promoted) == (0, 0)
        assert server.state.admission.num_running_seqs == 0
