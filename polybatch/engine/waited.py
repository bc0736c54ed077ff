"""How long this process's threads waited for a processor that others had: Linux's own count of it."""

from __future__ import annotations

from pathlib import Path

TASKS = Path("/proc/self/task")


def waited_s() -> float:
    """Seconds, all threads together, since each began; 0 where the system does not count them."""
    total = 0
    try:
        threads = list(TASKS.iterdir())
    except OSError:
        return 0.0
    for thread in threads:
        try:
            # Nanoseconds on a processor, nanoseconds ready and waiting for one, times it got one.
            total += int((thread / "schedstat").read_text().split()[1])
        except (OSError, IndexError):
            # The thread has ended, or the kernel was built without these counts.
            continue
    return total / 1e9
