"""What an output must look like. Pure data, with the limits that can be checked by looking at it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

from polybatch.errors import RequestError

MAX_SPEC_BYTES = 256 << 10
MAX_SCHEMA_DEPTH = 64
MAX_CHOICES = 4_096
MAX_REPETITION = 10_000
"""The largest count in a regular expression: each is unrolled."""

_COUNT = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}")

KINDS = ("json_schema", "regex", "choice", "grammar")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredSpec:
    """One of four forms; hashable, and equal for equal sources.

    json_schema: an object or its JSON text; kept as text. The output is one JSON value, properties in the
    order of the schema. regex: matched by the whole output; Rust's syntax, without look-around and back
    references. choice: the output is one of these strings. grammar: Lark in llguidance's dialect, or GBNF
    (EBNF with `::=`); the output matches its start rule, `start` or `root`.

    Raises RequestError that names the form and its limit. Whether it compiles is seen only later.
    """

    json_schema: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: SequenceOf[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise RequestError(
                f"structured output has {' and '.join(given) or 'nothing'}; give one of {', '.join(KINDS)}",
                field=given[-1] if given else "structured",
            )
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _schema_text(self.json_schema))
        elif self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        else:
            kind = given[0]
            text = getattr(self, kind)
            if not isinstance(text, str) or not text:
                raise _bad(kind, f"is {str(text)[:80]!r}; it must be a string that is not empty")
            _check_counts(kind, text)
        size = len(self.source.encode("utf-8", "surrogatepass"))
        if size > MAX_SPEC_BYTES:
            raise _bad(self.kind, f"has {size:,} bytes; the limit is {MAX_SPEC_BYTES:,}")

    @property
    def kind(self) -> str:
        """Which of the four it is."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def source(self) -> str:
        """It as text; choices as a JSON list."""
        value = getattr(self, self.kind)
        return value if isinstance(value, str) else json.dumps(value)


def _bad(kind: str, what: str) -> RequestError:
    return RequestError(f"{kind} {what}", field=kind)


def _schema_text(schema: object) -> str:
    """A schema as JSON text, its depth and the counts of its patterns checked."""
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise _bad("json_schema", f"is not valid JSON: {error}") from error
    if not isinstance(value, (dict, bool)):
        raise _bad("json_schema", f"is {text[:80]}; it must be an object")
    for depth, key, child in _walk(value):
        if depth > MAX_SCHEMA_DEPTH:
            raise _bad("json_schema", f"is nested deeper than {MAX_SCHEMA_DEPTH} levels: flatten it")
        if key == "pattern" and isinstance(child, str):
            _check_counts("json_schema", child)
        if key == "patternProperties" and isinstance(child, dict):
            for pattern in child:
                _check_counts("json_schema", pattern)
    return text


def _walk(value: object) -> Iterator[tuple[int, str | None, object]]:
    """(depth, key, value) of everything in a JSON value, without recursion."""
    stack: list[tuple[int, str | None, object]] = [(0, None, value)]
    while stack:
        item = stack.pop()
        yield item
        depth, current = item[0], item[2]
        if isinstance(current, dict):
            stack += [(depth + 1, name, child) for name, child in current.items()]
        elif isinstance(current, list):
            stack += [(depth + 1, None, child) for child in current]


def _choices(choice: object) -> tuple[str, ...]:
    is_list = isinstance(choice, (list, tuple)) and bool(choice)
    if not is_list or not all(isinstance(text, str) and text for text in choice):  # type: ignore[attr-defined]
        raise _bad("choice", f"is {str(choice)[:80]}; it must be a list of strings that are not empty")
    texts: tuple[str, ...] = tuple(choice)  # type: ignore[arg-type]
    if len(texts) > MAX_CHOICES:
        raise _bad("choice", f"has {len(texts):,} entries; the limit is {MAX_CHOICES:,}")
    return texts


def _check_counts(kind: str, pattern: str) -> None:
    for found in _COUNT.finditer(pattern):
        for digits in found.groups():
            if digits and (len(digits) > len(str(MAX_REPETITION)) or int(digits) > MAX_REPETITION):
                shown = found.group()[:40]
                raise _bad(kind, f"repeats {shown}; the limit of a repetition is {MAX_REPETITION:,}")
