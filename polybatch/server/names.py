"""Which adapter a body asks for; four ways to say it.

"model": "sql"                          an adapter as the model, as in vLLM
"model": "base:sql"                     base and adapter, as in SGLang
"adapter_id": "sql"                     as in LoRAX and TGI
"lora": [{"id": "sql", "scale": 1}]     as in llama.cpp
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from polybatch.errors import RequestError
from polybatch.server.errors import HttpError

MAX_NAMES_IN_ERROR = 10


def adapter_of(
    model: str,
    adapter_id: object,
    lora: object,
    *,
    base_names: Sequence[str],
    adapters: Collection[str],
) -> str | None:
    """The adapter to use, None for the base model.

    adapter_id, lora: those fields of the body, None where absent. Raises HttpError 404 for an unknown model,
    RequestError for an unknown adapter, a malformed field, or two that disagree.
    """
    asked = {
        "model": _from_model(model, base_names, adapters),
        "adapter_id": _from_id(adapter_id),
        "lora": _from_list(lora),
    }
    given = {field: name for field, name in asked.items() if name is not None}
    for field, name in given.items():
        if name not in adapters:
            raise RequestError(
                f"{field} names the adapter {name!r}; known are {_some(adapters)}", field=field
            )
    if len(set(given.values())) > 1:
        said = " and ".join(f"{field} {name!r}" for field, name in given.items())
        raise RequestError(f"{said} name different adapters: use one", field=list(given)[-1])
    return next(iter(given.values()), None)


def _from_model(model: str, base_names: Sequence[str], adapters: Collection[str]) -> str | None:
    if model in base_names:
        return None
    if model in adapters:
        return model
    for base in base_names:
        if model.startswith(f"{base}:"):
            return model.removeprefix(f"{base}:")
    raise unknown_model(model, base_names, adapters)


def unknown_model(model: str, base_names: Sequence[str], adapters: Collection[str]) -> HttpError:
    known = _some([*base_names, *sorted(adapters)])
    return HttpError(
        404,
        f"model {model[:100]!r} is not served here; known are {known}",
        param="model",
        code="model_not_found",
    )


def _from_id(value: object) -> str | None:
    if value is None or (isinstance(value, str) and value):
        return value
    raise RequestError(f"adapter_id is {str(value)[:80]!r}; it must be an adapter's name", field="adapter_id")


def _from_list(value: object) -> str | None:
    if value is None or value == []:
        return None
    if not isinstance(value, list) or len(value) != 1:
        raise RequestError("lora must be a list of exactly one {id, scale}", field="lora")
    entry = value[0]
    if (
        not isinstance(entry, Mapping)
        or not isinstance(entry.get("id"), str)
        or entry.keys() - {"id", "scale"}
    ):
        raise RequestError(
            f'lora[0] is {str(entry)[:80]!r}; it must be {{"id": adapter\'s name, "scale": 1}}',
            field="lora[0]",
        )
    scale: Any = entry.get("scale", 1)
    if isinstance(scale, bool) or scale != 1:
        raise RequestError(
            f"lora[0].scale is {str(scale)[:80]}; only 1 is supported: change the adapter's lora_alpha",
            field="lora[0].scale",
        )
    name: str = entry["id"]
    return name


def _some(names: Collection[str]) -> str:
    shown = sorted(names) if not isinstance(names, list) else names
    more = f" and {len(shown) - MAX_NAMES_IN_ERROR} more" if len(shown) > MAX_NAMES_IN_ERROR else ""
    return (", ".join(shown[:MAX_NAMES_IN_ERROR]) or "none") + more
