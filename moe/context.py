"""What the gate and experts seams cannot carry: facts about the batch that the training loop knows.

Shapes: B sequences, S positions of each, T = B*S tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Record = Callable[[int, Tensor, Tensor], None]
Replay = Callable[[int], Tensor | None]


@dataclass(frozen=True)
class Slots:
    """Adapters that train at once: their tokens stand one after another in the batch, in the order of the slots.

    Attributes:
        rows: tokens of each slot, known to the host.
        streams: what each slot's random draws in this pass are keyed by.
    """

    rows: tuple[int, ...]
    streams: tuple[str, ...]


@dataclass(frozen=True)
class BatchContext:
    """Set by the loop around one forward pass and the backward pass that belongs to it.

    Attributes:
        aux_scale: what auxiliary losses injected in this pass are multiplied by. They bypass the main loss, so the
            loop puts ``1 / gradient_accumulation_steps`` here.
        balance: whether auxiliary losses and routing statistics are wanted (off in evaluation).
        shape: (B, S); None if the tokens are not known to form sequences.
        mask_T: false for padding, which counts in no loss and no statistic; None if all tokens are real.
        segment_T: which of its row's samples each token belongs to, counted from 0, where rows are packed; None: a row
            is one sample.
        task_T: the task of each token's sample; None if the data names none.
        prompt_T: true for tokens of their sample's prompt, which come before its first token with loss; None: what a
            prompt is has not been said.
        samples: the most samples that a row holds; needed beside prompts where rows are packed.
        slot_T: the adapter that each token belongs to, where several train at once; None: there is one.
        slots: the same as the host knows it, so that nothing has to be read back.
        adapted: whether adapters add what they do; false in a first pass that asks for the base model's states.
        micro_step: 0 in the first pass of an optimizer step.
        record: called as ``record(layer, index_TK, weights_TK)`` with what each gate decided; in training once per
            layer, not again when a checkpointed layer is recomputed.
        replay: ``replay(layer)`` gives the choices index_TK to take instead of the gate's own, or None.
        kept: what the first pass through a layer leaves for its recompute, by key; see :meth:`first`.
    """

    aux_scale: float = 1.0
    balance: bool = True
    shape: tuple[int, int] | None = None
    mask_T: Tensor | None = None
    segment_T: Tensor | None = None
    task_T: Tensor | None = None
    prompt_T: Tensor | None = None
    samples: int | None = None
    slot_T: Tensor | None = None
    slots: Slots | None = None
    adapted: bool = True
    micro_step: int = 0
    record: Record | None = None
    replay: Replay | None = None
    kept: dict[Any, Any] = field(default_factory=dict)

    def first(self, layer: int) -> bool:
        """Whether ``layer``'s gate runs for the first time in this context. Activation checkpointing runs it again.

        Gradients cannot tell: with ``use_reentrant=False`` they are on in both passes.
        """
        if ("seen", layer) in self.kept:
            return False
        self.kept["seen", layer] = True
        return True


_EVALUATION = BatchContext(balance=False)
# Of the process, not a ContextVar: autograd recomputes checkpointed layers of a GPU in a thread of its own.
_current: BatchContext = _EVALUATION


def current() -> BatchContext:
    return _current


@contextmanager
def batch_context(context: BatchContext) -> Iterator[None]:
    global _current
    before, _current = _current, context
    try:
        yield
    finally:
        _current = before
