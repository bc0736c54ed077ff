"""Which adapter a body asks for; four ways to say it.

"model": "sql"                          an adapter as the model, as in vLLM
"model": "base:sql"                     base and adapter, as in SGLang
"adapter_id": "sql"                     as in LoRAX and TGI
"lora": [{"id": "sql", "scale": 1}]     as in llama.cpp; several entries or other scales are a mixture
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from polybatch.errors import RequestError
from polybatch.mixture import MAX_MIXED, MAX_SCALE, Mixture
from polybatch.server.errors import HttpError

MAX_NAMES_IN_ERROR = 10


def adapter_of(
    model: str,
    adapter_id: object,
    lora: object,
    *,
    base_names: Sequence[str],
    adapters: Collection[str],
) -> str | Mixture | None:
    """The adapter to use, None for the base model.

    adapter_id, lora: those fields of the body, None where absent. Raises HttpError 404 for an unknown model,
    RequestError for an unknown adapter, a malformed field, or two that disagree.
    """
    asked = {
        "model": _from_model(model, base_names, adapters),
        "adapter_id": _from_id(adapter_id),
        "lora": _from_list(lora),
    }
    given = {field: choice for field, choice in asked.items() if choice is not None}
    for field, choice in given.items():
        for name in [name for name, _ in choice.parts] if isinstance(choice, Mixture) else [choice]:
            if name not in adapters:
                raise RequestError(
                    f"{field} names the adapter {name[:100]!r}; known are {_some(adapters)}", field=field
                )
    if len(set(given.values())) > 1:
        said = " and ".join(
            f"{field} {choice.name if isinstance(choice, Mixture) else choice!r}"
            for field, choice in given.items()
        )
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


def _from_list(value: object) -> str | Mixture | None:
    if value is None or value == []:
        return None
    if not isinstance(value, list) or len(value) > MAX_MIXED:
        raise RequestError(f"lora must be a list of at most {MAX_MIXED} {{id, scale}}", field="lora")
    parts = [_from_entry(entry, f"lora[{index}]") for index, entry in enumerate(value)]
    if len({name for name, _ in parts}) < len(parts):
        raise RequestError("lora names an adapter twice: add its scales", field="lora")
    return parts[0][0] if len(parts) == 1 and parts[0][1] == 1 else Mixture(parts)


def _from_entry(entry: object, where: str) -> tuple[str, float]:
    if (
        not isinstance(entry, Mapping)
        or not isinstance(entry.get("id"), str)
        or entry.keys() - {"id", "scale"}
    ):
        raise RequestError(
            f'{where} is {str(entry)[:80]!r}; it must be {{"id": adapter\'s name, "scale": 1}}', field=where
        )
    scale = entry.get("scale", 1)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) <= MAX_SCALE:
        raise RequestError(
            f"{where}.scale is {str(scale)[:80]}; it must be a number from -{MAX_SCALE:g} to {MAX_SCALE:g}",
            field=f"{where}.scale",
        )
    return entry["id"], float(scale)


def _some(names: Collection[str]) -> str:
    shown = sorted(names) if not isinstance(names, list) else names
    more = f" and {len(shown) - MAX_NAMES_IN_ERROR} more" if len(shown) > MAX_NAMES_IN_ERROR else ""
    return (", ".join(shown[:MAX_NAMES_IN_ERROR]) or "none") + more
