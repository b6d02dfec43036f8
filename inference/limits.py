"""What an engine can serve at all, checked before a request is taken. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from inference.errors import RequestError
from inference.requests import Request

MAX_ROWS = 512  # rows of a step, as the engine is opened by default: longer prompts are read in chunks
MAX_SEQUENCES = 64  # that are computed at once, likewise
CAPTURED_ROWS = 8  # of a step that is captured: beyond, reading an expert once per row costs more than launches do


@dataclass(frozen=True)
class Limits:
    """What no request may exceed.

    Attributes:
        vocabulary: tokens of the model.
        positions: the longest text that the model knows, None if it names none.
        kv_tokens: places of the whole key-value cache.
        kv_bytes: its memory.
        adapters: names of those that are loaded; None stands for the base model.
        has_tokenizer: whether there is text.
    """

    vocabulary: int
    positions: int | None
    kv_tokens: int
    kv_bytes: int
    adapters: tuple[str | None, ...] = (None,)
    has_tokenizer: bool = True

    def check(self, request: Request) -> None:
        """Raises RequestError saying what cannot be served, and what could be."""
        self.check_adapter(request.adapter)
        self.check_tokens("prompt_ids", request.prompt_ids)
        self.check_tokens("stop_token_ids", request.params.stop_token_ids)
        self.check_tokens("logit_bias", [token for token, _ in request.params.logit_bias])
        self.check_length(len(request.prompt_ids), request.max_new_tokens)
        if request.params.stop and not self.has_tokenizer:
            raise RequestError("stop", "the model has no tokenizer, so no text to stop at; give stop_token_ids")

    def check_adapter(self, adapter: str | None) -> None:
        if adapter not in self.adapters:
            loaded = ", ".join(name for name in self.adapters if name is not None) or "none"
            asked = "no adapter was asked for" if adapter is None else f"there is no adapter {adapter!r}"
            raise RequestError("adapter", f"{asked}; loaded: {loaded}")

    def check_tokens(self, field: str, tokens: Sequence[int]) -> None:
        wrong = next((token for token in tokens if not 0 <= token < self.vocabulary), None)
        if wrong is not None:
            raise RequestError(field, f"token {wrong} is outside the model's vocabulary of {self.vocabulary}")

    def check_length(self, prompt: int, new: int) -> None:
        if self.positions is not None and prompt + new > self.positions:
            raise RequestError(
                "max_new_tokens",
                f"{prompt} prompt tokens and {new} new ones exceed the model's {self.positions} positions; "
                "shorten the prompt or ask for fewer tokens",
            )
        if prompt + new > self.kv_tokens:
            raise RequestError(
                "max_new_tokens",
                f"{prompt} prompt tokens and {new} new ones can never fit the key-value cache, which holds "
                f"{self.kv_tokens} tokens in {self.kv_bytes / 1e6:.1f} MB; shorten the prompt, ask for fewer tokens, "
                f"or give it more room: kv_tokens={prompt + new} takes "
                f"{self.kv_bytes / self.kv_tokens * (prompt + new) / 1e6:.1f} MB",
            )
