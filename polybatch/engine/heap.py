"""Keep Python's cycle collector away from what lives as long as the engine.

A model's libraries are some 200,000 objects. Once enough new ones have come, a full collection looks at all
of them, a pause of about a tenth of a second in the midst of steps of ten milliseconds. Frozen objects are
never looked at; reference counts free them as ever.
"""

from __future__ import annotations

import gc


def freeze_heap() -> None:
    """Take everything there is now for permanent; to be called when start-up is over."""
    gc.collect()
    gc.freeze()


def unfreeze_heap() -> None:
    """Let the collector look at everything again."""
    gc.unfreeze()
