"""Text of an answer while it is made: whole characters only, and nothing that a stop string may yet take back.

No torch here: a tokenizer is anything that decodes ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]

_BROKEN = "\ufffd"
# The longest run of broken characters that can become whole ones: tokenizers that fall back to bytes show each byte of
# an unfinished run as one. A run begins after the last whole text but one: four bytes, and three of the next character.
_UNFINISHED = 7
# Tokens that are decoded again with each new one while no text comes out whole.
_WINDOW = 64


class Detokeniser:
    """Turns tokens into text one by one, so that all texts together are the text of all tokens.

    Decoders look at their neighbours (sentencepiece drops a text's first space), so a token is decoded after the piece
    of text before it. What is no valid UTF-8 comes out as U+FFFD once it is sure that no later token completes it.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0  # where decoding begins: the last place but one that ended whole
        self._whole = 0  # the last place that ended whole
        self._shown = 0  # characters of what is decoded from there that were given out

    def push(self, token: int) -> str:
        """The text that this token makes sure; often none."""
        self._ids.append(token)
        text = self._decode(self._ids[self._start :])
        sure = self._sure(text)
        new, self._shown = text[self._shown : sure], max(self._shown, sure)
        if sure == len(text):
            self._begin_at(self._whole)
            self._whole = len(self._ids)
        elif len(self._ids) - self._start > _WINDOW:
            self._begin_at(len(self._ids) - _WINDOW // 4)
        return new

    def finish(self) -> str:
        """What was held back; no token will come."""
        return self._decode(self._ids[self._start :])[self._shown :]

    def _begin_at(self, start: int) -> None:
        self._start = start
        self._shown = self._sure(self._decode(self._ids[start:]))

    @staticmethod
    def _sure(text: str) -> int:
        broken = len(text) - len(text.rstrip(_BROKEN))
        return len(text) - min(broken, _UNFINISHED)


class StopStrings:
    """Lets text through up to the first stop string, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.met = False

    def push(self, text: str) -> str:
        """The text that may be given out. ``met`` is set when a stop string was complete; nothing comes after."""
        assert not self.met
        self._held += text
        # The one that is complete first, so that it does not matter in which pieces the text comes.
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.met = True
            return self._held[: min(found)[1]]
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        sure = len(self._held) - keep
        new, self._held = self._held[:sure], self._held[sure:]
        return new

    def finish(self) -> str:
        """What was held back; no text will come."""
        return self._held

    def _overlap(self, stop: str) -> int:
        """The length of the longest end of the held text that ``stop`` begins with."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0


class AnswerText:
    """Both together: tokens in, text out."""

    def __init__(self, decode: Decode | None, stops: Sequence[str]) -> None:
        self._detokeniser = None if decode is None else Detokeniser(decode)
        self._stops = StopStrings(stops)

    @property
    def stopped(self) -> bool:
        return self._stops.met

    def push(self, token: int) -> str:
        return "" if self._detokeniser is None else self._stops.push(self._detokeniser.push(token))

    def finish(self) -> str:
        """The rest. A stop string that only now is complete ends the text all the same."""
        if self._detokeniser is None or self.stopped:
            return ""
        text = self._stops.push(self._detokeniser.finish())
        return text if self.stopped else text + self._stops.finish()
