"""The fields of a body that say what the output must look like, in the several ways that clients spell them.

"response_format": {"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}    OpenAI
"structured_outputs": {"regex": "..."}, and before that "guided_regex": "..."                vLLM
"regex", "ebnf", "json_schema"                                                               SGLang
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from polybatch.errors import RequestError
from polybatch.structured.spec import StructuredSpec

ANY_OBJECT = {"type": "object"}

_KINDS: dict[str, str] = {
    "json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar",
}  # fmt: skip
_FLAT: dict[str, str] = {
    "guided_json": "json_schema", "guided_regex": "regex", "guided_choice": "choice",
    "guided_grammar": "grammar", "regex": "regex", "ebnf": "grammar", "json_schema": "json_schema",
}  # fmt: skip

STRUCTURED_FIELDS = frozenset(("response_format", "structured_outputs", *_FLAT))


def structured_spec(fields: Mapping[str, Any]) -> StructuredSpec | None:
    """What the fields of a body ask for; None for free text.

    fields: without nulls. Raises RequestError that names the field, also where two ask for different things.
    """
    found: dict[str, StructuredSpec] = {}
    for name in sorted(STRUCTURED_FIELDS & fields.keys()):
        value = fields[name]
        if name == "response_format":
            spec = _response_format(value)
        elif name == "structured_outputs":
            spec = _structured_outputs(value)
        else:
            spec = _spec(name, _FLAT[name], value)
        if spec is not None:
            found[name] = spec
    if len(found) > 1:
        names = list(found)
        raise RequestError(f"{' and '.join(names)} both shape the output: use one", field=names[-1])
    return next(iter(found.values()), None)


def _spec(field: str, kind: str, value: Any) -> StructuredSpec:
    """A spec whose errors name the field as the client spelled it."""
    make: Callable[..., StructuredSpec] = StructuredSpec
    try:
        return make(**{kind: value})
    except RequestError as error:
        raise RequestError(f"{field}: {error}", field=field) from error


def _response_format(value: Any) -> StructuredSpec | None:
    kind = value.get("type") if isinstance(value, Mapping) else None
    match kind:
        case "text":
            return None
        case "json_object":
            return StructuredSpec(json_schema=ANY_OBJECT)
        case "json_schema":
            inner = value.get("json_schema")
            if not isinstance(inner, Mapping) or inner.get("schema") is None:
                raise RequestError(
                    'response_format.json_schema must be {"name": ..., "schema": {...}}',
                    field="response_format.json_schema",
                )
            # "strict": false would allow less; what a schema says is always kept.
            return _spec("response_format.json_schema.schema", "json_schema", inner["schema"])
    raise RequestError(
        f"response_format is {str(value)[:80]}; its type must be text, json_object or json_schema",
        field="response_format",
    )


def _structured_outputs(value: Any) -> StructuredSpec | None:
    where = "structured_outputs"
    if not isinstance(value, Mapping):
        raise RequestError(f"{where} is {str(value)[:80]!r}; it must be an object", field=where)
    given = {name: entry for name, entry in value.items() if entry is not None and entry is not False}
    if given.pop("json_object", False):
        given["json"] = given.get("json", ANY_OBJECT)
    for name in given:
        if name not in _KINDS:
            raise RequestError(
                f"{where}.{name} is not supported; supported are json_object, {', '.join(_KINDS)}",
                field=f"{where}.{name}",
            )
    if len(given) != 1:
        raise RequestError(f"{where} has {', '.join(given) or 'nothing'}; give one form", field=where)
    ((name, entry),) = given.items()
    return _spec(f"{where}.{name}", _KINDS[name], entry)
