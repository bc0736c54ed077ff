"""Names that a kernel's variant binds at compile time: `if TYPE_CHECKING: from ... import tile1, GROUP`.

A kernel is written over names that `rebind` puts in as globals, one set per variant. They have no value
before; importing them here tells the type checker, and the reader, which names those are.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    raise AttributeError(f"{name} has a value only inside a compiled variant; import it under TYPE_CHECKING")
