"""Model families by `model_type`. A new family is one file and one line here."""

from __future__ import annotations

from polybatch.errors import ModelError
from polybatch.models import llama, mistral, qwen2, qwen3
from polybatch.models.family import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY for module in (llama, mistral, qwen2, qwen3)
}


def find_family(model_type: str, source: str) -> Family:
    """The family of a `model_type`; source names the file in the error.

    Raises ModelError that lists the supported ones.
    """
    family = FAMILIES.get(model_type)
    if family is None:
        raise ModelError(
            f"{source}: model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    return family
