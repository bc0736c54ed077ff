"""The nouns that every room speaks: what is asked, how far it has come, what comes out.

No torch here: the scheduler, the page bookkeeping and the simulator use these very objects.
`Request`, `SamplingParams` and the outputs are immutable; `Sequence` is the one running state.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from polybatch.errors import RequestError
from polybatch.structured.spec import StructuredSpec

MAX_LOGPROBS = 100
MAX_N = 128
MAX_STOP_STRINGS = 64


def _bad(name: str, value: object, limit: str) -> RequestError:
    return RequestError(f"{name} is {value!r}; it must be {limit}", field=name)


def _check_number(name: str, value: object, low: float, high: float, limit: str) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise _bad(name, value, limit)
    if not math.isfinite(value) or not low <= value <= high:
        raise _bad(name, value, limit)


def _check_int(name: str, value: object, low: int, high: int, limit: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _bad(name, value, limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, with the field's usual names.

    n: completions per prompt; they share the prompt's KV.
    temperature: 0 is greedy. top_k: 0 is off. top_p, min_p: nucleus and relative floor.
    repetition_penalty: > 1 discourages tokens of prompt and output (Keskar et al. 2019).
    presence_penalty, frequency_penalty: subtracted by output counts, as OpenAI defines them.
    logit_bias: token id -> added to its logit, -100 to 100.
    seed: random numbers are keyed by (seed, completion index, position), never by the batch;
        None lets the engine choose one.
    stop: strings; the output ends before the first, or after it with include_stop_str_in_output.
    stop_token_ids: token ids; the output ends with it. ignore_eos: only the lengths end it.
    max_tokens: None means up to max_model_len. min_tokens: no stop before so many.
    logprobs: best alternatives returned per output token; prompt_logprobs: per prompt token.
    structured: what the output must look like; where it may end is for its grammar, not for ignore_eos.

    Raises RequestError that names the field, its value and its limits.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: SequenceOf[str] = ()
    stop_token_ids: SequenceOf[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured: StructuredSpec | None = None

    def __post_init__(self) -> None:
        _check_int("n", self.n, 1, MAX_N, f"an integer from 1 to {MAX_N}")
        _check_number("temperature", self.temperature, 0, 100, "a number from 0 to 100")
        if isinstance(self.top_k, int) and self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        _check_int("top_k", self.top_k, 0, 2**31, "0 or -1 (off) or a positive integer")
        if self.top_p == 0:
            raise _bad("top_p", self.top_p, "greater than 0, at most 1")
        _check_number("top_p", self.top_p, 0, 1, "greater than 0, at most 1")
        _check_number("min_p", self.min_p, 0, 1, "a number from 0 to 1")
        if self.repetition_penalty == 0:
            raise _bad("repetition_penalty", self.repetition_penalty, "greater than 0, at most 100")
        _check_number("repetition_penalty", self.repetition_penalty, 0, 100, "greater than 0, at most 100")
        _check_number("presence_penalty", self.presence_penalty, -2, 2, "a number from -2 to 2")
        _check_number("frequency_penalty", self.frequency_penalty, -2, 2, "a number from -2 to 2")
        self._check_logit_bias()
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**64 - 1, "a 64-bit integer or None")
        self._check_stops()
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, 2**31, "a positive integer or None")
        _check_int("min_tokens", self.min_tokens, 0, 2**31, "0 or a positive integer")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _bad("min_tokens", self.min_tokens, f"at most max_tokens, {self.max_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _check_int(name, value, 0, MAX_LOGPROBS, f"an integer from 0 to {MAX_LOGPROBS}, or None")
        if self.structured is not None:
            if not isinstance(self.structured, StructuredSpec):
                raise _bad("structured", self.structured, "a StructuredSpec or None")
            if self.min_tokens:
                raise _bad("min_tokens", self.min_tokens, "0 beside structured output: its form ends it")

    def _check_logit_bias(self) -> None:
        if not isinstance(self.logit_bias, dict):
            raise _bad("logit_bias", self.logit_bias, "a map from token ids to numbers")
        for token, bias in self.logit_bias.items():
            _check_int("logit_bias", token, 0, 2**31, "keyed by token ids")
            _check_number("logit_bias", bias, -100, 100, "numbers from -100 to 100")

    def _check_stops(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if stop is None:
            stop = ()
        if not isinstance(stop, (list, tuple)) or not all(isinstance(s, str) and s for s in stop):
            raise _bad("stop", self.stop, "a non-empty string or a list of them")
        if len(stop) > MAX_STOP_STRINGS:
            raise _bad("stop", f"{len(stop)} strings", f"at most {MAX_STOP_STRINGS} strings")
        object.__setattr__(self, "stop", tuple(stop))
        ids = () if self.stop_token_ids is None else self.stop_token_ids
        if not isinstance(ids, (list, tuple)):
            raise _bad("stop_token_ids", ids, "a list of token ids")
        for token in ids:
            _check_int("stop_token_ids", token, 0, 2**31, "a list of token ids")
        object.__setattr__(self, "stop_token_ids", tuple(ids))


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """A registered adapter as the torch-free rooms see it.

    digest: hash of its content; equal digests are the same weights whatever their names.
    num_pages: pages of the pool that it takes while resident.
    parts: of a mixture (`polybatch.mixture`): the digest and scale of each adapter in it, by digest.
    """

    name: str
    digest: str
    num_pages: int
    parts: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Deadlines:
    """When a request's tokens are due, in seconds; None where nothing is promised.

    ttft_s: first token, from arrival. tpot_s: each further token after the one before.
    e2e_s: last token, from arrival. Raises RequestError for what is not positive.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s", "e2e_s"):
            value = getattr(self, name)
            if value is not None:
                _check_number(name, value, 1e-6, 1e9, "a positive number of seconds")


@dataclass(frozen=True, slots=True)
class WorkflowStage:
    """A request's place in a workflow of several calls with one deadline.

    workflow_id: equal for all calls of one workflow. stage: this call's kind. due_s: when the whole workflow
    must end, on the engine's clock. remaining: kinds of the stages that are expected after this one.
    """

    workflow_id: str
    stage: str
    due_s: float
    remaining: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked, resolved and checked. Immutable.

    prompt_token_ids: at least one token. max_tokens: resolved, prompt + max_tokens fits the model.
    seed: resolved. stop_token_ids: all ids that end it, end-of-sequence ids included unless ignored.
    priority: lower first. arrival_s: on the engine's clock. cache_salt: prefixes are shared only
    between equal salts. tenant: on whose account it runs; of a set that is bounded.
    num_shared_tokens: so many tokens at the prompt's beginning are known to all, and their KV is shared
    whatever the salt; what follows is not. deadlines, workflow: what the policy `deadline` goes by.
    expected_tokens: of output, where somebody knows better than max_tokens; an estimate, never a limit.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    seed: int
    stop_token_ids: frozenset[int] = frozenset()
    prompt: str | None = None
    adapter: AdapterRef | None = None
    priority: int = 0
    arrival_s: float = 0.0
    cache_salt: str = ""
    tenant: str = ""
    num_shared_tokens: int = 0
    deadlines: Deadlines | None = None
    workflow: WorkflowStage | None = None
    expected_tokens: int | None = None


class FinishReason(enum.StrEnum):
    """Why a sequence ended; the values are those of the OpenAI interface."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class SequenceStatus(enum.Enum):
    """WAITING -> RUNNING -> FINISHED; preemption leads from RUNNING back to WAITING."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Sequence:
    """One completion of a request: its tokens, how many have KV, and the pages that hold it.

    Phases are derived from one counter: `num_computed` tokens have their KV in `pages`.
    A sequence decodes when only its newest token lacks KV, and prefills otherwise
    (its prompt, or prompt and output again after a preemption).
    """

    __slots__ = (
        "adapter",
        "finish_reason",
        "index",
        "num_cached",
        "num_computed",
        "num_preemptions",
        "num_prompt",
        "pages",
        "request",
        "row",
        "status",
        "stop_reason",
        "tokens",
    )

    def __init__(self, request: Request, index: int = 0) -> None:
        self.request = request
        self.index = index
        self.adapter = request.adapter
        self.tokens: list[int] = list(request.prompt_token_ids)
        self.num_prompt = len(self.tokens)
        self.num_computed = 0
        self.num_cached = 0
        self.num_preemptions = 0
        self.pages: list[int] = []
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.row: int | None = None
        """The executor's row for this sequence while it runs; owned by the executor."""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        """Tokens that still lack KV; 1 while decoding."""
        return len(self.tokens) - self.num_computed

    @property
    def is_prefilling(self) -> bool:
        return len(self.tokens) - self.num_computed > 1 or self.num_computed < self.num_prompt

    @property
    def output_token_ids(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.request_id!r}#{self.index}, {self.status.name}, "
            f"{self.num_computed}/{len(self.tokens)} tokens, {len(self.pages)} pages)"
        )


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of a token at a position, its rank in the vocabulary (1 is best), its text."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times on the engine's clock in seconds; None where the request never got there.

    predicted_ttft_s, predicted_e2e_s: seconds from arrival, told at arrival; missed: deadlines that were then
    expected to be missed. None without deadlines, or where nothing predicts.
    ttft_met, tpot_met, e2e_met: whether deadlines were kept; None for those that there were not.
    """

    arrival_s: float
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    num_preemptions: int = 0
    predicted_ttft_s: float | None = None
    predicted_e2e_s: float | None = None
    missed: tuple[str, ...] | None = None
    ttft_met: bool | None = None
    tpot_met: bool | None = None
    e2e_met: bool | None = None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One completion. `text` never ends inside a UTF-8 character nor holds part of a stop string."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """All completions of one request, so far or finished."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    adapter: str | None = None
    metrics: RequestMetrics | None = None
    error: str | None = None
    error_kind: str = "EngineError"
    """The class of `polybatch.errors` that the error is of."""
