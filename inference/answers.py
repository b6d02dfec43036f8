"""One request's answer while it is made: its tokens, its text, and when it ends."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from inference.requests import Output, Request
from inference.sampling import Chosen, TokenChooser
from inference.scheduler import Sequence
from inference.text import AnswerText, Decode


class Answer:
    """A request on its way.

    Attributes:
        sequence: the scheduler's part of it.
        chooser: the sampler's.

    ``special`` are the tokens that no text shows, by their names: a stop string that is one of them ends with it.
    """

    def __init__(self, request: Request, decode: Decode | None, special: Mapping[str, int]) -> None:
        self.request = request
        self.sequence = Sequence(request.id, list(request.prompt_ids), request.adapter)
        self.chooser = TokenChooser(request.params, request.prompt_ids)
        # Decoding leaves special tokens out, so no text would ever match them.
        self._ends = {*request.params.stop_token_ids, *(special[s] for s in request.params.stop if s in special)}
        self._text = AnswerText(decode, request.params.stop)

    def add(self, new: Chosen, eos: Set[int]) -> Output:
        """One more token; ``eos`` are the tokens that end a text. The output says whether the answer ends with it."""
        self.sequence.tokens.append(new.token)
        params, text, finish = self.request.params, "", None
        if new.token in eos and not params.ignore_eos:
            finish = "eos"
        elif new.token in self._ends:
            finish = "stop"
        else:
            text = self._text.push(new.token)
            if not self._text.stopped and len(self.sequence.new_tokens) >= self.request.max_new_tokens:
                finish = "length"
        if finish is not None:
            text += self._text.finish()
        if self._text.stopped:
            finish = "stop"
        logprobs = () if new.logprobs is None else (new.logprobs,)
        return self.output(new_ids=(new.token,), text=text, logprobs=logprobs, finish=finish)

    def output(self, **what: Any) -> Output:
        return Output(self.request.id, reused=self.sequence.reused, **what)
