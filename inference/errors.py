"""What the runtime refuses, as sentences. No torch here."""

from __future__ import annotations


class InferenceError(ValueError):
    """A model folder, prompt or setting that the runtime cannot serve: what, where, and what to do."""


class RequestError(InferenceError):
    """One request that cannot be served; all others go on.

    Attributes:
        field: the name of the setting that is wrong, as in :class:`~inference.requests.SamplingParams` or
            :class:`~inference.requests.Request`.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class NotCaptured(InferenceError):
    """Decode steps that graphs were asked for and that are computed one launch after the other instead.

    Attributes:
        why: what is in the way; ``remedy`` is for those who asked.
    """

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(f"{why}; {remedy}")
        self.why = why
