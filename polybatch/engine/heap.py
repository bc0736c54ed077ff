"""Keep Python's cycle collector away from what lives as long as the engine.

A model's libraries are some 200,000 objects. Once enough new ones have come, a full collection looks at all
of them, a pause of about a tenth of a second in the midst of steps of ten milliseconds. Frozen objects are
never looked at; reference counts free them as ever.

Python freezes all or nothing, so of several engines in a process the last one gives the heap back.

Prompts are put in with the collector paused (`collector_paused`): it would look at each of their tokens, more
than once, before the device has anything to do. So is an executor made, of thousands of launches.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator

_lock = threading.Lock()
_users: set[object] = set()


def freeze_heap() -> Callable[[], None]:
    """Take everything there is now for permanent; to be called when start-up is over.

    Returns what ends that for its caller: the collector looks at everything again once nobody is left who
    wants it frozen. Further calls do nothing.
    """
    user = object()
    with _lock:
        gc.collect()
        gc.freeze()
        _users.add(user)

    def thaw() -> None:
        with _lock:
            if user in _users:
                _users.remove(user)
                if not _users:
                    gc.unfreeze()

    return thaw


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Let the cycle collector wait, where what is made lives on, so that looking through it frees nothing.

    Where somebody paused it already it stays so.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
