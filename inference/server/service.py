"""From a parsed request to the engine's answers: model names, limits, prompts. No HTTP here."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from inference.errors import InferenceError, RequestError
from inference.prompts import ChatPrompts, TokenBytes
from inference.requests import Request, SamplingParams
from inference.server.bodies import Choice, Frame
from inference.server.engine_thread import Call, EngineThread
from inference.server.errors import bad_request, context_too_long, no_such_model
from inference.server.fields import ChatRequest, CompletionRequest, Generation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Normalisation may shorten a text before it is cut into tokens, by less than this factor.
_SHORTENED = 4
_DEFAULT_NEW_TOKENS = 16  # OpenAI's, of a plain completion
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Served:
    """What the server offers.

    Attributes:
        name: of the base model; ``name:adapter`` is the model with an adapter.
        adapters: names of those that are loaded.
        positions: tokens that a prompt and its answer may have together.
        vocabulary: token ids are below it.
        max_new_tokens: the most that a request may ask for.
        fingerprints: by adapter, None for the base; one changes when the files of the model or the software do.
    """

    name: str
    adapters: tuple[str, ...]
    positions: int
    vocabulary: int
    max_new_tokens: int
    fingerprints: Mapping[str | None, str]

    @property
    def models(self) -> tuple[str, ...]:
        return (self.name, *(f"{self.name}:{adapter}" for adapter in self.adapters))

    def adapter_of(self, model: str) -> str | None:
        """Raises ApiError for a model that is not here."""
        if model not in self.models:
            raise no_such_model(model, self.models)
        return None if model == self.name else model.removeprefix(f"{self.name}:")


@dataclass
class Job:
    """A request on its way: its call to the engine, its choices so far, and the shape of its body."""

    call: Call
    frame: Frame
    choices: list[Choice]
    prompt_tokens: int


class Service:
    """Turns requests into jobs. Tokenising happens in one thread, with a tokenizer that nobody else uses."""

    def __init__(
        self, engine: EngineThread, served: Served, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
    ) -> None:
        self.engine, self.served = engine, served
        self.started = int(time.time())
        self._tokenizer = tokenizer
        self._chat = ChatPrompts(tokenizer, chat_template)
        self._token = TokenBytes(tokenizer)
        self._longest_token = max(map(len, tokenizer.get_vocab()), default=1)
        self._tokenising = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    @property
    def has_chat_template(self) -> bool:
        return self._chat.template is not None

    async def begin(self, asked: CompletionRequest | ChatRequest, arrived: float) -> Job:
        """Hand a request to the engine. Raises ApiError if it is refused, before anything is generated."""
        adapter = self.served.adapter_of(asked.model)
        self.engine.check_open()
        field = "messages" if isinstance(asked, ChatRequest) else "prompt"
        if isinstance(asked, ChatRequest):
            params = self._params(asked, 1, (asked.top_logprobs or 0) if asked.logprobs else None)
            prompts = [await self._apart(lambda: self._chat_ids(asked))]
        else:
            many = asked.prompts()
            params = self._params(asked, len(many), asked.logprobs)
            prompts = await self._apart(lambda: [self._text_ids(prompt) for prompt in many])
        rooms = [self._new_tokens(asked, len(ids), field) for ids in prompts]
        try:
            requests = [
                Request("", ids, each, room, adapter)
                for ids, room in zip(prompts, rooms, strict=True)
                for each in params
            ]
            call = self.engine.submit(requests, arrived)
        except RequestError as error:
            names = {"prompt_ids": field, "max_new_tokens": "max_tokens"}
            raise bad_request(f"{error}.", names.get(error.field, error.field), "invalid_value") from error
        return self._job(asked, call, sum(map(len, prompts)), params[0].logprobs is not None)

    def _params(self, asked: Generation, prompts: int, logprobs: int | None) -> list[SamplingParams]:
        """Of each choice. Raises ApiError if there would be more answers than the queue can ever hold."""
        if prompts * asked.choices > self.engine.max_queue:
            raise bad_request(
                f"n={asked.choices} answers to each of {prompts} prompts are more than this server's queue of "
                f"{self.engine.max_queue} holds; ask for fewer at a time.",
                "n" if prompts == 1 else "prompt",
                "too_many_answers",
            )
        return asked.sampling(self.served.vocabulary, logprobs)

    def give_up(self, job: Job) -> None:
        """Nobody waits for the rest of a job, if there is any."""
        if self.engine.cancel(job.call):
            self.engine.metrics.cancelled.add()

    def _job(self, asked: Generation, call: Call, prompt_tokens: int, wanted: bool) -> Job:
        chat = isinstance(asked, ChatRequest)
        self.engine.metrics.prompt_tokens.add(prompt_tokens)
        head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": self.served.fingerprints[self.served.adapter_of(asked.model)],
        }
        frame = Frame(chat, head, self._token, wanted, asked.wants_usage, asked.choices)
        return Job(call, frame, [Choice(self._token) for _ in call.index], prompt_tokens)

    def _new_tokens(self, asked: Generation, prompt: int, field: str) -> int:
        """How many tokens an answer may have. Raises ApiError if the request asks for more than there is room for."""
        wanted, name = asked.max_tokens, "max_tokens"
        if isinstance(asked, ChatRequest) and asked.max_completion_tokens is not None:
            wanted, name = asked.max_completion_tokens, "max_completion_tokens"
        room = self.served.positions - prompt
        if room < (wanted or 1):
            raise context_too_long(self.served.positions, prompt, wanted or 1, field)
        if wanted is not None and wanted > self.served.max_new_tokens:
            raise bad_request(
                f"{name} is too large: {wanted}. This server gives at most {self.served.max_new_tokens} new tokens.",
                name,
                "invalid_value",
            )
        if wanted is not None:
            return wanted
        return min(room, self.served.max_new_tokens, *(() if field == "messages" else (_DEFAULT_NEW_TOKENS,)))

    def _chat_ids(self, asked: ChatRequest) -> tuple[int, ...]:
        messages = []
        for i, message in enumerate(asked.messages):
            role = "system" if message.role == "developer" else message.role
            entry = {"role": role, "content": message.text(f"messages[{i}]")}
            messages.append(entry | ({"name": message.name} if message.name else {}))
        self._check_characters(sum(len(message["content"]) for message in messages), "messages")
        try:
            return self._chat.encode(messages)
        except InferenceError as error:
            code = None if self.has_chat_template else "no_chat_template"
            raise bad_request(f"{error}.", "messages", code) from error

    def _text_ids(self, prompt: str | list[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            self._check_characters(len(prompt), "prompt")
            return tuple(self._tokenizer(prompt, verbose=False)["input_ids"])
        wrong = next((token for token in prompt if not 0 <= token < self.served.vocabulary), None)
        if wrong is not None:
            raise bad_request(
                f"'prompt': {wrong} is no token of this model; its ids are 0 to {self.served.vocabulary - 1}.",
                "prompt",
                "invalid_value",
            )
        return tuple(prompt)

    def _check_characters(self, count: int, field: str) -> None:
        """Raises ApiError for a text that cannot fit, before seconds are spent on cutting it into tokens."""
        at_least = count // (_SHORTENED * self._longest_token)
        if at_least > self.served.positions:
            raise context_too_long(self.served.positions, at_least, 1, field)

    async def _apart(self, work: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._tokenising, work)
