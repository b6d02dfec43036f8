"""``planaria chat``: a conversation in the terminal.

A line is a message; a line that begins with ``/`` is a command. Ctrl-C ends the answer that is being written and keeps
what there is of it; ctrl-D ends the program.
"""

from __future__ import annotations

import itertools
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import TextIOWrapper
from typing import TYPE_CHECKING, TextIO

from inference.errors import InferenceError, RequestError
from inference.prompts import ChatPrompts, read_template
from inference.requests import Request, SamplingParams
from inference.runtime import Runtime

if TYPE_CHECKING:
    from inference.batching import Engine
    from inference.engine import LLM

# What a model writes must not steer the terminal.
_VISIBLE = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
HELP = "/reset forgets the conversation, /history shows it, /quit ends; ctrl-C stops an answer"


@dataclass
class Conversation:
    """What was said, and how the next answer is made.

    Attributes:
        positions: tokens that the conversation may have, the next answer included.
        stopped: set by ctrl-C; looked at between two steps, so that no step is left half done.
    """

    engine: Engine
    prompts: ChatPrompts
    params: SamplingParams
    max_new_tokens: int
    positions: int
    system: str | None = None
    said: list[dict[str, str]] = field(default_factory=list)
    stopped: bool = False
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def messages(self) -> list[dict[str, str]]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.said]

    def answer(self, text: str, write: Callable[[str], object]) -> str:
        """Says ``text`` and writes the answer as it comes. Returns why it ended, as ``Output.finish`` says it.

        Raises InferenceError, and forgets ``text``, if it cannot be answered.
        """
        self.said.append({"role": "user", "content": text})
        self.stopped = False
        try:
            name = self._ask()
        except InferenceError:
            self.said.pop()
            raise
        parts: list[str] = []
        finish = "cancelled"
        while self.engine.has_work():
            if self.stopped:
                self.engine.cancel(name)
            for output in self.engine.step():
                parts.append(output.text)
                write(output.text.translate(_VISIBLE))
                if output.finish is not None:
                    finish, error = output.finish, output.error
                    if finish == "error":
                        self.said.pop()
                        raise InferenceError(f"the engine failed: {error}")
        self.said.append({"role": "assistant", "content": "".join(parts)})
        return finish

    def _ask(self) -> str:
        prompt_ids = self.prompts.encode(self.messages)
        room = self.positions - len(prompt_ids)
        if room < 1:
            raise RequestError(
                "prompt_ids",
                f"the conversation has {len(prompt_ids)} tokens, and the model's context {self.positions}; /reset "
                "begins a new one",
            )
        request = Request(f"chat-{next(self._numbers)}", prompt_ids, self.params, min(self.max_new_tokens, room))
        self.engine.submit(request)
        return request.id


def converse(conversation: Conversation, read: Callable[[], str], out: TextIO) -> None:
    """Until ``read`` raises EOFError or ``/quit`` comes."""

    def write(text: str) -> None:
        out.write(text)
        out.flush()

    while True:
        try:
            line = read().strip()
        except KeyboardInterrupt:
            write("\n(ctrl-D ends)\n")
            continue
        except EOFError:
            return
        if line == "/quit":
            return
        if line.startswith("/"):
            write(_command(conversation, line) + "\n")
        elif line:
            try:
                with _interrupting(conversation):
                    finish = conversation.answer(line, write)
                note = {"length": " [the most tokens an answer may have]", "cancelled": " [stopped]"}.get(finish, "")
                write(note + "\n")
            except InferenceError as error:
                write(f"{error}\n")


def _command(conversation: Conversation, line: str) -> str:
    if line == "/reset":
        conversation.said.clear()
        return "a new conversation"
    if line == "/history":
        return "\n".join(_shown(message) for message in conversation.messages) or "nothing was said yet"
    return HELP if line == "/help" else f"no command {line.split()[0]}; {HELP}"


def _shown(message: dict[str, str]) -> str:
    return f"{message['role']}: {message['content'].translate(_VISIBLE)}"


@contextmanager
def _interrupting(conversation: Conversation) -> Iterator[None]:
    """Ctrl-C sets ``stopped`` meanwhile, instead of raising in the middle of a step."""

    def stop(*_: object) -> None:
        conversation.stopped = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass(frozen=True)
class ChatOptions:
    """What the command line says; ``planaria chat --help`` explains each."""

    model_dir: str
    runtime: Runtime
    adapter: str | None = None
    chat_template: str | None = None
    system: str | None = None
    temperature: float = 0.7
    top_p: float = 1.0
    seed: int | None = None
    max_new_tokens: int = 1024


def chat(options: ChatOptions) -> int:
    """Until the user ends it. Returns the exit status.

    Raises InferenceError or AdapterError for a folder or setting that cannot be used.
    """
    params = SamplingParams(temperature=options.temperature, top_p=options.top_p, seed=options.seed)
    template = read_template(options.chat_template)
    with options.runtime.open(options.model_dir, adapter=options.adapter) as llm:
        _talk(llm, options, params, template)
    print(llm.stats())
    return 0


def _talk(llm: LLM, options: ChatOptions, params: SamplingParams, template: str | None) -> None:
    if llm.tokenizer is None:
        raise InferenceError(f"{options.model_dir} has no tokenizer, which a conversation needs; add tokenizer.json")
    prompts = ChatPrompts(llm.tokenizer, template)
    prompts.check()
    limits = llm.engine.limits
    positions = limits.kv_tokens if limits.positions is None else min(limits.positions, limits.kv_tokens)
    print(HELP)
    conversation = Conversation(llm.engine, prompts, params, options.max_new_tokens, positions, system=options.system)
    converse(conversation, terminal_reader(), sys.stdout)


def terminal_reader() -> Callable[[], str]:
    """Reads lines from a terminal with editing and a prompt, else from a pipe without."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 is refused, and the next one read
    if not sys.stdin.isatty():
        return input
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 -- importing it is what gives input() its editing

    return lambda: input("> ")
