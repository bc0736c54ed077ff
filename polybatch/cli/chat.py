"""`polybatch chat`: talk to the model in the terminal, changing adapters as you go.

Reads a line per message; from a pipe as well, where it prints nothing but answers.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Protocol

import typer
from rich.console import Console

from polybatch.cli.options import ChatTemplate, EngineOptions, with_engine
from polybatch.cli.remote import RemoteModel, api_key_of, refuse_engine_flags
from polybatch.errors import ConfigError, RequestError
from polybatch.request import SamplingParams

if TYPE_CHECKING:
    from polybatch.engine.core import EngineCore

HELP = """/adapter NAME  answer with this adapter (/adapter alone: with none)
/reset         forget the conversation
/quit          leave, as does Ctrl-D; Ctrl-C stops an answer"""


@with_engine
def chat(
    engine: EngineOptions,
    system: Annotated[str | None, typer.Option(help="System message of every conversation.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 0.95,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest answer; default what the model allows.")
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Talk to a running server; --model is then a name that it knows."),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="For --server; better in the environment, as POLYBATCH_API_KEY.")
    ] = None,
    chat_template: ChatTemplate = None,
) -> None:
    """Chat with the model. Type /help for what else there is."""
    from polybatch.cli.engines import open_core

    is_terminal = sys.stdin.isatty()
    console = Console(stderr=True, highlight=False)
    params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens)
    with ExitStack() as stack:
        if server is None:
            model, adapters = engine.chosen_model(), tuple(engine.adapters())
            quiet = not is_terminal
            core = stack.enter_context(open_core(engine, console, quiet, chat_template=chat_template))
            answers: Answers = CoreModel(core, params)
        else:
            refuse_engine_flags(engine, ("model", "model_name"))
            if chat_template is not None:
                raise ConfigError("--chat-template is the server's to choose: leave it out beside --server")
            wanted = engine.chosen_model() if engine.model or engine.model_name else None
            remote = stack.enter_context(closing(RemoteModel(server, api_key_of(api_key), wanted, params)))
            model, adapters, answers = remote.model, remote.adapters, remote
        talk = Conversation(answers, adapters, system)
        if is_terminal:
            names = ", ".join(talk.adapters) or "none"
            console.print(f"{model}, adapters: {names}. /help lists commands.", markup=False)
        _converse(talk, is_terminal)


class Answers(Protocol):
    """Whoever answers."""

    def __call__(self, messages: Sequence[dict[str, str]], adapter: str | None) -> Generator[str, None, None]:
        """Pieces of the answer; left early, it is stopped. Raises RequestError."""
        ...


class CoreModel:
    """Answers of an engine in this process."""

    def __init__(self, core: EngineCore, params: SamplingParams) -> None:
        self._core, self._params = core, params
        self._ids = itertools.count()

    def __call__(self, messages: Sequence[dict[str, str]], adapter: str | None) -> Generator[str, None, None]:
        request_id, shown = f"chat-{next(self._ids)}", ""
        prompt = self._core.encode_chat(messages)
        self._core.add_request(request_id, prompt, self._params, adapter, stream=True)
        try:
            while self._core.has_work():
                for output in self._core.step():
                    answer = output.outputs[0].text
                    yield answer[len(shown) :]
                    shown = answer
                    if output.error is not None:
                        raise RequestError(output.error)
        finally:
            self._core.abort(request_id)


@dataclass
class Conversation:
    """Messages so far and the adapter in use."""

    answers: Answers
    adapters: tuple[str, ...]
    system: str | None = None
    adapter: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, text: str, show: Callable[[str], None]) -> None:
        """Answer a message, showing pieces of text as they come. Ctrl-C keeps what came.

        Raises RequestError, and forgets the message, if it cannot be answered, for example because the
        conversation no longer fits.
        """
        self.messages.append({"role": "user", "content": text})
        shown: list[str] = []
        pieces = self.answers(self.messages, self.adapter)
        try:
            for piece in pieces:
                show(piece)
                shown.append(piece)
        except KeyboardInterrupt:
            pieces.close()
        except RequestError:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": "".join(shown)})

    def command(self, line: str) -> str | None:
        """Carry out a line that begins with a slash; returns what to say, or None to leave."""
        name, _, argument = line[1:].partition(" ")
        argument = argument.strip()
        if name in ("quit", "exit", "q"):
            return None
        if name == "reset":
            self.reset()
            return "forgotten"
        if name == "help":
            return HELP
        if name == "adapter":
            if argument and argument not in self.adapters:
                known = ", ".join(self.adapters) or "none; give some with --adapter NAME=DIR"
                return f"no adapter is called {argument!r}; known: {known}"
            self.adapter = argument or None
            return f"answering with {argument}" if argument else "answering without an adapter"
        return f"no command is called /{name}\n{HELP}"


def _converse(talk: Conversation, is_terminal: bool) -> None:
    def show(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    while True:
        try:
            line = _read(talk, is_terminal)
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D leaves", file=sys.stderr)
            continue
        if line is None:
            return
        if line.startswith("/"):
            reply = talk.command(line)
            if reply is None:
                return
            print(reply, file=sys.stderr)
        elif line:
            try:
                talk.ask(line, show)
            except RequestError as error:
                print(f"error: {error} (/reset starts afresh)", file=sys.stderr)
            print(flush=True)


def _read(talk: Conversation, is_terminal: bool) -> str | None:
    """The next line, or None at the end of input."""
    if not is_terminal:
        line = sys.stdin.readline()
        return line.strip() if line else None
    # Line editing and history; importing it is enough.
    import readline  # noqa: F401

    try:
        return input(f"{talk.adapter or ''}> ").strip()
    except EOFError:
        print()
        return None
