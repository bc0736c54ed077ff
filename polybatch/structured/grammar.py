"""Grammars compiled for one vocabulary, and matchers that say which tokens may come next.

A thin layer over llguidance, which builds no automaton ahead: compiling takes about a millisecond, a mask
over 49,152 tokens some 15 to 100 µs, and fuel limits bound both. Its matchers report errors and never raise.
Source: llguidance (MIT), whose syntax for Lark and JSON schemas is ours.
"""

from __future__ import annotations

import functools
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from polybatch.errors import RequestError
from polybatch.structured.spec import StructuredSpec
from polybatch.structured.vocabulary import Vocabulary

if TYPE_CHECKING:
    import llguidance

Bitmask = npt.NDArray[np.int32]

MAX_CACHED = 256
MAX_LEXER_STATES = 20_000
"""One to two kilobytes each."""
MAX_ERROR_CHARS = 400
NUM_TRIED_TOKENS = 4

WHITESPACE = r"( |\n[ \t]{0,32})?"
"""Between JSON's tokens: nothing, a space, or a line break with its indentation. Small models otherwise
write white space without end, because nothing forbids it."""


class Matcher:
    """Where one completion stands in its grammar."""

    __slots__ = ("_matcher", "_num_consumed", "error")

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher
        self._num_consumed = 0
        self.error: str | None = None

    def advance(self, tokens: Sequence[int], start: int) -> None:
        """Take in the output so far. tokens: of the sequence. start: where its output begins."""
        new = list(tokens[start + self._num_consumed :])
        self._num_consumed += len(new)
        if new and self.error is None and not self._matcher.consume_tokens(new):
            self._note_error()

    def _note_error(self) -> None:
        self.error = f"the grammar is too complex to follow: {_first_lines(self._matcher.get_error())}"


def fill_masks(matchers: Sequence[Matcher], masks: Bitmask) -> None:
    """Write one bit per token and matcher, 1 where the token may come next; several in threads.

    masks: [len(matchers), ceil(vocab / 32)] int32, contiguous. A matcher that fails has its `error` set, and
    its row means nothing.
    """
    working = [(matcher, row) for row, matcher in enumerate(matchers) if matcher.error is None]
    if len(working) == 1:
        matcher, row = working[0]
        matcher._matcher.unsafe_compute_mask_ptr(masks[row].ctypes.data, masks[row].nbytes)
    elif working:
        pairs = [(matcher._matcher, row) for matcher, row in working]
        _threads().unsafe_compute_mask_ptr(pairs, masks.ctypes.data, masks.shape[1] * 4, len(masks))
    for matcher, _ in working:
        if matcher._matcher.is_error():
            matcher._note_error()


@functools.cache
def _threads() -> llguidance.LLExecutor:
    import llguidance

    return llguidance.LLExecutor()


class Grammar:
    """A compiled spec; makes a fresh matcher for every completion."""

    def __init__(self, prototype: llguidance.LLMatcher) -> None:
        self._prototype = prototype

    def matcher(self) -> Matcher:
        return Matcher(self._prototype.deep_copy())


class GrammarCompiler:
    """Compiles specs for one vocabulary and remembers the last results, errors too. Thread-safe.

    vocabulary: called when first needed.
    """

    def __init__(self, vocabulary: Callable[[], Vocabulary], max_cached: int = MAX_CACHED) -> None:
        self._vocabulary, self._max_cached = vocabulary, max_cached
        self._known: OrderedDict[StructuredSpec, Grammar | RequestError] = OrderedDict()
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._lock = threading.Lock()
        self._building = threading.Lock()

    def is_known(self, spec: StructuredSpec) -> bool:
        """Whether `compile` answers at once."""
        with self._lock:
            return spec in self._known

    def compile(self, spec: StructuredSpec) -> Grammar:
        """Raises RequestError that says what is wrong with it."""
        with self._lock:
            found = self._known.get(spec)
            if found is not None:
                self._known.move_to_end(spec)
        if found is None:
            try:
                found = self._compile(spec)
            except RequestError as error:
                found = error
            with self._lock:
                self._known[spec] = found
                while len(self._known) > self._max_cached:
                    self._known.popitem(last=False)
        if isinstance(found, RequestError):
            raise RequestError(str(found), field=found.field)
        return found

    def _compile(self, spec: StructuredSpec) -> Grammar:
        import llguidance

        limits = llguidance.LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        tokenizer = self._llguidance_tokenizer()
        matcher = llguidance.LLMatcher(tokenizer, _as_llguidance(spec), log_level=0, limits=limits)
        reason = matcher.get_error() or _try_out(matcher.deep_copy())
        if reason:
            raise RequestError(f"{spec.kind} cannot be used: {_first_lines(reason)}", field=spec.kind)
        return Grammar(matcher)

    def _llguidance_tokenizer(self) -> llguidance.LLTokenizer:
        try:
            import llguidance
        except ModuleNotFoundError as error:
            raise RequestError(
                "structured output needs llguidance: pip install 'polybatch[structured]'", field="structured"
            ) from error
        with self._building:
            if self._tokenizer is None:
                vocabulary = self._vocabulary()
                wrapper: Any = _Wrapper(vocabulary)
                self._tokenizer = llguidance.LLTokenizer(
                    wrapper, n_vocab=len(vocabulary.tokens), eos_token=vocabulary.eos_ids
                )
                wrapper.tokenizer = self._tokenizer
            return self._tokenizer


def _try_out(matcher: llguidance.LLMatcher) -> str:
    """Why the first tokens of an output cannot be followed; much is only built when it is first looked at."""
    for _ in range(NUM_TRIED_TOKENS):
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
        if matcher.is_error() or matcher.is_stopped() or not len(allowed):
            break
        matcher.consume_token(int(allowed[0]))
    return matcher.get_error()


class _Wrapper:
    """A vocabulary as llguidance asks for it."""

    is_tokenizer_wrapper = True

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens, self.special_token_ids = vocabulary.tokens, vocabulary.special_ids
        self.eos_token_id, self.bos_token_id = vocabulary.eos_ids[0], None
        self.tokenizer: llguidance.LLTokenizer | None = None

    def __call__(self, text: str) -> list[int]:
        """Tokens of text that a grammar forces, longest first.

        A tokenizer's own way may add a space in front, and then other bytes would come of it.
        """
        assert self.tokenizer is not None
        return self.tokenizer.greedy_tokenize(text)


def _as_llguidance(spec: StructuredSpec) -> str:
    from llguidance import LLMatcher

    try:
        match spec.kind:
            case "json_schema":
                return LLMatcher.grammar_from_json_schema(
                    spec.source, overrides={"whitespace_pattern": WHITESPACE, "whitespace_flexible": True}
                )
            case "regex":
                return LLMatcher.grammar_from_regex(spec.source)
            case "choice":
                choices = " | ".join(json.dumps(text) for text in spec.choice or ())
                return LLMatcher.grammar_from_lark(f"start: {choices}")
            case _:
                return LLMatcher.grammar_from_lark(_as_lark(spec.source))
    except ValueError as error:
        raise RequestError(f"{spec.kind} cannot be used: {error}", field=spec.kind) from error


def _as_lark(grammar: str) -> str:
    if "::=" not in grammar:
        return grammar
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(grammar)
    except Exception as error:  # the converter raises nothing narrower
        raise RequestError(f"grammar cannot be read as GBNF: {error}", field="grammar") from error


def _first_lines(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip() and "non-verbose" not in line]
    return " ".join(lines)[:MAX_ERROR_CHARS] or "no reason is given"
