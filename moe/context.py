"""What the gate and experts seams cannot carry: facts about the batch that the training loop knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BatchContext:
    """Set by the loop around a forward pass.

    Attributes:
        aux_scale: what auxiliary losses injected in this pass are multiplied by. They bypass the main loss, so the
            loop puts ``1 / gradient_accumulation_steps`` here.
        balance: whether auxiliary losses and routing statistics are wanted (off in evaluation).
        record: called by each gate with its layer, indices [T,K] and weights [T,K].
        replay: called by each gate with its layer; indices [T,K] that it must take instead of its own, or None.
    """

    aux_scale: float = 1.0
    balance: bool = True
    record: Callable[[int, Tensor, Tensor], None] | None = None
    replay: Callable[[int], Tensor | None] | None = None


_EVALUATION = BatchContext(balance=False)
_current: ContextVar[BatchContext] = ContextVar("batch_context", default=_EVALUATION)


def current() -> BatchContext:
    return _current.get()


@contextmanager
def batch_context(context: BatchContext) -> Iterator[None]:
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)
