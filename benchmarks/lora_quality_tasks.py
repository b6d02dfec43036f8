"""Eight tasks that conflict on the same input, in sequences whose examples are all that says which task is meant.

A task maps a word of ``LENGTH`` symbols to an answer of as many tokens: a function, whose symbols are then all shifted
along the alphabet. A sample is ``BOS word SEP answer (END word SEP answer) * examples``, the last word being the query.
Nothing names the task; but the examples of a sample tell it apart from every other task of its set.

The base learns the eight functions unshifted. Adapters learn to answer the query with each function's own shift. What
the examples show them is either *old*, the unshifted answers that the base knows, or *new*, the shifted ones.

Shapes: B samples, K words of a sample (its examples and the query), L symbols of a word, S tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LENGTH = 4
SYMBOLS = 10
BLANK, BOS, SEP, END = range(SYMBOLS, SYMBOLS + 4)
VOCABULARY = SYMBOLS + 4


def _rot(x_NL: Tensor) -> Tensor:
    return (x_NL + 3) % SYMBOLS


def _copy(x_NL: Tensor) -> Tensor:
    return x_NL


def _reverse(x_NL: Tensor) -> Tensor:
    return x_NL.flip(1)


def _sort(x_NL: Tensor) -> Tensor:
    return x_NL.sort(dim=1).values


def _dedupe(x_NL: Tensor) -> Tensor:
    """The first of each symbol, in order, then blanks."""
    same_NLL = (x_NL[:, :, None] == x_NL[:, None, :]).tril(-1)
    repeated_NL = same_NLL.any(2)
    order_NL = repeated_NL.long().sort(dim=1, stable=True).indices
    return x_NL.masked_fill(repeated_NL, BLANK).gather(1, order_NL)


def _prefix_sum(x_NL: Tensor) -> Tensor:
    return x_NL.cumsum(1) % SYMBOLS


def _depth(x_NL: Tensor) -> Tensor:
    """How many brackets are open after each symbol; the lower half of the alphabet opens, the upper closes one."""
    depth_N = torch.zeros_like(x_NL[:, 0])
    found = []
    for symbol_N in x_NL.unbind(1):
        depth_N = (depth_N + torch.where(symbol_N < SYMBOLS // 2, 1, -1)).clamp(min=0)
        found.append(depth_N)
    return torch.stack(found, 1)


def _lookup(x_NL: Tensor) -> Tensor:
    """Each symbol is a key; its value is the symbol after its first occurrence, the word read as a ring."""
    first_NL = (x_NL[:, :, None] == x_NL[:, None, :]).long().argmax(2)
    return x_NL.gather(1, (first_NL + 1) % LENGTH)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "copy": _copy,
    "reverse": _reverse,
    "sort": _sort,
    "rot": _rot,
    "dedupe": _dedupe,
    "prefix sum": _prefix_sum,
    "depth": _depth,
    "lookup": _lookup,
}


@dataclass(frozen=True)
class Task:
    """A function and how far its answers are shifted along the alphabet; blanks stay."""

    name: str
    shift: int = 0

    def __call__(self, x_NL: Tensor) -> Tensor:
        y_NL = FUNCTIONS[self.name](x_NL)
        return torch.where(y_NL == BLANK, y_NL, (y_NL + self.shift) % SYMBOLS)


@dataclass(frozen=True)
class Batch:
    """Samples of a set of tasks.

    Attributes:
        tokens_BS: the samples.
        scored_BS: whether a token is one that training learns: of the query's answer; where examples are solved as
            the query is, of theirs, too, but the first's.
        task_B: index of each sample's task.
    """

    tokens_BS: Tensor
    scored_BS: Tensor
    task_B: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.tokens_BS.to(device), self.scored_BS.to(device), self.task_B.to(device))


class TaskSet:
    """Samples of ``tasks``, as many of each in every batch.

    Args:
        examples: solved words before the query. They tell the sample's task from every other of the set.
        shown: the tasks that solve the examples, ``tasks`` themselves if not given.
    """

    def __init__(self, tasks: Sequence[Task], examples: int, shown: Sequence[Task] = ()) -> None:
        self.tasks, self.examples = tuple(tasks), examples
        self.shown = tuple(shown) or self.tasks
        assert len(self.shown) == len(self.tasks)

    @property
    def length(self) -> int:
        """S."""
        return (2 * LENGTH + 2) * (self.examples + 1)

    def batch(self, size: int, seed: int) -> Batch:
        """``size`` samples, sorted by task; ``seed`` alone decides them."""
        assert size % len(self.tasks) == 0, (size, len(self.tasks))
        generator = torch.Generator().manual_seed(seed)
        task_B = torch.arange(len(self.tasks)).repeat_interleave(size // len(self.tasks))
        x_BKL = self._words(size, generator)
        while (unclear_B := self._unclear(x_BKL, task_B)).any():
            x_BKL[unclear_B] = self._words(int(unclear_B.sum()), generator)
        return self._assemble(x_BKL, task_B)

    def _words(self, size: int, generator: torch.Generator) -> Tensor:
        return torch.randint(SYMBOLS, (size, self.examples + 1, LENGTH), generator=generator)

    def _unclear(self, x_BKL: Tensor, task_B: Tensor) -> Tensor:
        """Whether some other task would give the same answers to all examples."""
        each_TBX = torch.stack([task(x_BKL[:, :-1].flatten(0, 1)).view(len(task_B), -1) for task in self.shown])
        own_BX = each_TBX[task_B, torch.arange(len(task_B))]
        return (each_TBX == own_BX).all(2).sum(0) > 1

    def _assemble(self, x_BKL: Tensor, task_B: Tensor) -> Batch:
        size, words, _ = x_BKL.shape
        y_BKL = _answers(self.shown, x_BKL, task_B)
        y_BKL[:, -1:] = _answers(self.tasks, x_BKL[:, -1:], task_B)
        before = torch.full((size, words, 1), END)
        before[:, 0] = BOS
        sep = torch.full((size, words, 1), SEP)
        scored = torch.zeros(size, words, 2 * LENGTH + 2, dtype=torch.bool)
        scored[:, 1 if self.shown == self.tasks else -1 :, -LENGTH:] = True
        return Batch(torch.cat([before, x_BKL, sep, y_BKL], dim=2).flatten(1), scored.flatten(1), task_B)


def _answers(tasks: Sequence[Task], x_BKL: Tensor, task_B: Tensor) -> Tensor:
    each_TBKL = torch.stack([task(x_BKL.flatten(0, 1)).view_as(x_BKL) for task in tasks])
    return each_TBKL[task_B, torch.arange(len(task_B))]


OLD = tuple(Task(name) for name in FUNCTIONS)
# Eight different shifts, none of them zero; copy and rot never coincide.
NEW = tuple(Task(name, shift) for name, shift in zip(FUNCTIONS, (2, 5, 9, 4, 7, 1, 6, 8), strict=True))


def learnt(examples: int, shown: Literal["old", "new"]) -> TaskSet:
    """What adapters learn."""
    return TaskSet(NEW, examples, OLD if shown == "old" else NEW)
