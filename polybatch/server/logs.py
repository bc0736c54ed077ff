"""The status line: every few seconds what the engine does, in one line; nothing while nothing happens.

running 12, waiting 3, 1,234 tok/s in, 567 out, KV 45 %, prefix hits 71 %
"""

from __future__ import annotations

import asyncio
import logging

from polybatch.engine.snapshot import EngineSnapshot
from polybatch.server.engine_view import EngineView
from polybatch.server.metrics import kv_usage

logger = logging.getLogger("polybatch.server")

INTERVAL_S = 10.0


async def report_status(view: EngineView, interval_s: float = INTERVAL_S) -> None:
    """Log a line after every interval in which a step was done. Ends by being cancelled."""
    before, life = await view.look(), view.life
    while True:
        await asyncio.sleep(interval_s)
        now = await view.look()
        if before is not None and now is not None and life == view.life:
            line = status_line(before, now)
            if line is not None:
                logger.info("%s", line)
        before, life = now, view.life


def status_line(before: EngineSnapshot, now: EngineSnapshot) -> str | None:
    """What happened between two moments; None if no step was done.

    Hits are of the prompts that began in between, rates of tokens that were computed.
    """
    was, stats = before.stats.scheduler, now.stats.scheduler
    elapsed_s = now.at_s - before.at_s
    if now.stats.times.num_steps <= before.stats.times.num_steps or elapsed_s <= 0:
        return None
    parts = [
        f"running {stats.num_running:,}",
        f"waiting {stats.num_waiting:,}",
        f"{(stats.num_prefill_tokens - was.num_prefill_tokens) / elapsed_s:,.0f} tok/s in",
        f"{(stats.num_output_tokens - was.num_output_tokens) / elapsed_s:,.0f} out",
        f"KV {kv_usage(now):.0%}".replace("%", " %"),
    ]
    num_queried = stats.num_prefix_query_tokens - was.num_prefix_query_tokens
    if num_queried > 0:
        hits = (stats.num_prefix_hit_tokens - was.num_prefix_hit_tokens) / num_queried
        parts.append(f"prefix hits {hits:.0%}".replace("%", " %"))
    if preempted := stats.num_preemptions - was.num_preemptions:
        parts.append(f"preempted {preempted:,}")
    return ", ".join(parts)
