"""The bodies of answers, whole and in pieces, as OpenAI's API defines them."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from inference.prompts import TokenBytes
from inference.requests import Output, TokenLogprobs

# OpenAI knows no word for a model's end of text other than stop.
_FINISH = {"eos": "stop", "stop": "stop", "length": "length"}
_LEAST_LOGPROB = -9999.0  # what OpenAI writes for minus infinity, which JSON lacks
Json = dict[str, Any]


class Choice:
    """One of the ``choices``, as far as it has come.

    Attributes:
        offsets: for each of ``logprobs`` the number of characters that the tokens before it spell.
    """

    def __init__(self, token: TokenBytes) -> None:
        self._token = token
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        self._spelt = 0
        self.text = ""
        self.logprobs: list[TokenLogprobs] = []
        self.offsets: list[int] = []
        self.finish: str | None = None
        self.tokens = self.reused = 0

    def add(self, output: Output) -> None:
        self.text += output.text
        self.tokens += len(output.new_ids)
        self.reused = output.reused
        for each in output.logprobs:
            self.offsets.append(self._spelt)
            self._spelt += len(self._decoder.decode(self._token(each.token_id)))
        self.logprobs += output.logprobs
        if output.finish is not None:
            self.finish = _FINISH[output.finish]


@dataclass(frozen=True)
class Frame:
    """What all bodies of one call share.

    Attributes:
        chat: chat completions, else plain ones.
        head: id, created, model and system_fingerprint.
        logprobs: whether log probabilities were asked for.
        wants_usage: pieces end with one that has the usage, and all others say ``null``.
        per_prompt: choices for each prompt; those to one prompt follow each other.
    """

    chat: bool
    head: Json
    token: TokenBytes
    logprobs: bool
    wants_usage: bool
    per_prompt: int

    def whole(self, choices: Sequence[Choice], prompt_tokens: int) -> Json:
        kind = "chat.completion" if self.chat else "text_completion"
        bodies = [self._choice(i, choice) for i, choice in enumerate(choices)]
        return {**self.head, "object": kind, "choices": bodies, "usage": self._usage(choices, prompt_tokens)}

    def opening(self, index: int) -> Json | None:
        """The first piece of a chat's answer, which says whose it is."""
        return self._piece(index, {"role": "assistant", "content": "", "refusal": None}) if self.chat else None

    def piece(self, index: int, output: Output, choice: Choice) -> Json | None:
        """What an output adds, if it adds anything. It is in ``choice`` already."""
        if not output.text and not (self.logprobs and output.logprobs):
            return None
        offsets = choice.offsets[len(choice.offsets) - len(output.logprobs) :]
        logprobs = self._logprobs(output.logprobs, offsets)
        return self._piece(index, {"content": output.text} if self.chat else output.text, logprobs)

    def closing(self, index: int, choice: Choice) -> Json:
        return self._piece(index, {} if self.chat else "", finish=choice.finish)

    def last(self, choices: Sequence[Choice], prompt_tokens: int) -> Json:
        return {**self._piece_head(), "choices": [], "usage": self._usage(choices, prompt_tokens)}

    def _choice(self, index: int, choice: Choice) -> Json:
        said: Json = (
            {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
            if self.chat
            else {"text": choice.text}
        )
        logprobs = self._logprobs(choice.logprobs, choice.offsets)
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": choice.finish}

    def _piece(self, index: int, said: Any, logprobs: Json | None = None, finish: str | None = None) -> Json:
        choice = {"index": index, "delta" if self.chat else "text": said, "logprobs": logprobs, "finish_reason": finish}
        return {**self._piece_head(), "choices": [choice], **({"usage": None} if self.wants_usage else {})}

    def _piece_head(self) -> Json:
        return {**self.head, "object": "chat.completion.chunk" if self.chat else "text_completion"}

    def _logprobs(self, logprobs: Sequence[TokenLogprobs], offsets: Sequence[int]) -> Json | None:
        if not self.logprobs:
            return None
        return self._of_chat(logprobs) if self.chat else self._of_text(logprobs, offsets)

    def _of_chat(self, logprobs: Sequence[TokenLogprobs]) -> Json:
        return {
            "content": [
                {
                    **self._entry(each.token_id, each.logprob),
                    "top_logprobs": [self._entry(token_id, logprob) for token_id, logprob in each.top],
                }
                for each in logprobs
            ],
            "refusal": None,
        }

    def _entry(self, token_id: int, logprob: float) -> Json:
        return {
            "token": self.token.text(token_id),
            "logprob": max(logprob, _LEAST_LOGPROB),
            "bytes": list(self.token(token_id)),
        }

    def _of_text(self, logprobs: Sequence[TokenLogprobs], offsets: Sequence[int]) -> Json:
        chosen = [(self.token.text(each.token_id), max(each.logprob, _LEAST_LOGPROB)) for each in logprobs]
        return {
            "tokens": [text for text, _ in chosen],
            "token_logprobs": [logprob for _, logprob in chosen],
            # The chosen token is always there, as at OpenAI.
            "top_logprobs": [
                {self.token.text(token_id): max(logprob, _LEAST_LOGPROB) for token_id, logprob in each.top}
                | dict([own])
                for each, own in zip(logprobs, chosen, strict=True)
            ],
            "text_offset": list(offsets),
        }

    def _usage(self, choices: Sequence[Choice], prompt_tokens: int) -> Json:
        """Each prompt counts once, however many choices it has."""
        new = sum(choice.tokens for choice in choices)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": new,
            "total_tokens": prompt_tokens + new,
            "prompt_tokens_details": {"cached_tokens": sum(choice.reused for choice in choices[:: self.per_prompt])},
        }
