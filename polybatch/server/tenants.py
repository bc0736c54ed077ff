"""What each tenant may do, from a YAML file, and which prefixes tenants share.

    default: {max_reqs: 64, tokens_per_minute: 200000}
    tenants:
      acme: {max_reqs: 8, max_queued_tokens: 50000, adapters: ["acme-*", shared]}
    shared_prefixes:
      - {system: "You are the support desk of ...", tenants: [acme, zeta]}
      - {text: "Translate into French:\\n"}

A tenant's entry overrides `default` field by field; what neither says is not limited. Cached prefixes belong
to one tenant. A shared prefix is the one exception, and only an administrator makes it: while a prompt is the
same as the granted text, token by token, its pages are those of all who were granted it; from the first token
that differs on, everything is private again. What others can learn is whether somebody used the granted text
lately.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from polybatch.engine.ports import TextTokenizer
from polybatch.errors import ConfigError, RequestError
from polybatch.server.key_file import check_tenant

MAX_SHARED_PREFIXES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantLimits:
    """None is no limit.

    max_reqs: completions in flight, waiting or running. max_queued_tokens: prompt tokens that wait.
    tokens_per_minute: prompt and output tokens, on average; a minute's worth may come at once.
    adapters: names, or patterns such as "acme-*", that the tenant sees.
    """

    max_reqs: int | None = None
    max_queued_tokens: int | None = None
    tokens_per_minute: int | None = None
    adapters: tuple[str, ...] | None = None

    def may_use(self, adapter: str) -> bool:
        return self.adapters is None or any(fnmatchcase(adapter, pattern) for pattern in self.adapters)


UNLIMITED = TenantLimits()


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """system: the system message of conversations; else the beginning of raw prompts.

    tenants: who shares it, None for all.
    """

    text: str
    is_system: bool
    tenants: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class TenantBook:
    """The file's content."""

    default: TenantLimits = UNLIMITED
    tenants: dict[str, TenantLimits] | None = None
    shared_prefixes: tuple[SharedPrefix, ...] = ()

    def limits(self, tenant: str) -> TenantLimits:
        return (self.tenants or {}).get(tenant, self.default)

    def visible(self, tenant: str, adapters: Collection[str]) -> Collection[str]:
        """The adapters that exist for a tenant."""
        limits = self.limits(tenant)
        return adapters if limits.adapters is None else [name for name in adapters if limits.may_use(name)]


class SharedPrefixes:
    """Shared prefixes as token ids."""

    def __init__(self, prefixes: Iterable[SharedPrefix] = (), tokenizer: TextTokenizer | None = None) -> None:
        """Raises ConfigError without a tokenizer to make token ids with, or where the template fails."""
        self._granted: list[tuple[tuple[int, ...], frozenset[str] | None]] = []
        for prefix in prefixes:
            if tokenizer is None:
                raise ConfigError("shared_prefixes need a model with a tokenizer: remove them")
            try:
                text = prefix.text
                if prefix.is_system:
                    messages = [{"role": "system", "content": text}, {"role": "user", "content": ""}]
                    text = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
                ids = tuple(tokenizer.encode(text, not prefix.is_system))
            except RequestError as error:
                raise ConfigError(f"a shared prefix cannot be made into tokens: {error}") from error
            self._granted.append((ids, prefix.tenants))

    def num_shared(self, tenant: str, token_ids: Sequence[int]) -> int:
        """Tokens at a prompt's beginning that are also those of a prefix that the tenant was granted."""
        granted = (ids for ids, tenants in self._granted if tenants is None or tenant in tenants)
        return max((_num_common(ids, token_ids) for ids in granted), default=0)


def _num_common(one: Sequence[int], other: Sequence[int]) -> int:
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))


def read_tenants(path: Path | None) -> TenantBook:
    """The book of a file; without one nobody is limited. Raises ConfigError that names the entry."""
    if path is None:
        return TenantBook()
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--tenants {path} cannot be read: {error}") from error
    where = f"--tenants {path}"
    top = _map(content, ("default", "tenants", "shared_prefixes"), where)
    default = _limits(top.get("default") or {}, UNLIMITED, f"{where}: default")
    tenants = top.get("tenants") or {}
    if not isinstance(tenants, dict):
        raise ConfigError(f"{where}: tenants must map names to limits")
    prefixes = top.get("shared_prefixes", [])
    if not isinstance(prefixes, list) or len(prefixes) > MAX_SHARED_PREFIXES:
        raise ConfigError(f"{where}: shared_prefixes must be a list of at most {MAX_SHARED_PREFIXES}")
    return TenantBook(
        default,
        {check_tenant(str(name)): _limits(value or {}, default, f"{where}: {name}")
         for name, value in tenants.items()},
        tuple(_prefix(entry, f"{where}: shared_prefixes[{index}]") for index, entry in enumerate(prefixes)),
    )  # fmt: skip


def _map(value: Any, known: Collection[str], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a map of {', '.join(known)}")
    for name in value:
        if name not in known:
            raise ConfigError(f"{where} has {str(name)[:80]!r}; known are {', '.join(known)}")
    return value


def _limits(value: Any, default: TenantLimits, where: str) -> TenantLimits:
    names = tuple(field.name for field in fields(TenantLimits))
    given = dict(_map(value, names, where))
    for name, limit in given.items():
        if name == "adapters":
            given[name] = _names(limit, f"{where}.adapters")
        elif limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise ConfigError(f"{where}.{name} is {str(limit)[:80]!r}; it must be a positive integer")
    return replace(default, **given)


def _prefix(value: Any, where: str) -> SharedPrefix:
    entry = _map(value, ("system", "text", "tenants"), where)
    kinds = [kind for kind in ("system", "text") if entry.get(kind) is not None]
    if len(kinds) != 1 or not isinstance(entry[kinds[0]], str) or not entry[kinds[0]]:
        raise ConfigError(f"{where} must have either system or text, a string that is not empty")
    names = _names(entry.get("tenants"), f"{where}.tenants")
    return SharedPrefix(entry[kinds[0]], kinds[0] == "system", None if names is None else frozenset(names))


def _names(value: Any, where: str) -> tuple[str, ...] | None:
    if value is not None and (not isinstance(value, list) or not all(isinstance(n, str) for n in value)):
        raise ConfigError(f"{where} must be a list of names")
    return None if value is None else tuple(value)
