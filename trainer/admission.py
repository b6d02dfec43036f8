"""Which tenants fit, from sizes alone, before anything is loaded (no torch here).

A worker holds the frozen base once. Every tenant adds its factors, their gradients and optimizer state, what one of its
micro-batches keeps for the backward pass (:mod:`trainer.activations`), and what that pass needs beside.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from checkpointing.cost import size
from checkpointing.moments import state_width
from lora.cost import parameters
from trainer.activations import micro_batches, saved_bytes, working_bytes
from trainer.model_shapes import Shapes, model_shapes
from trainer.schema import Recipe

_FP32 = 4
_GIB = 1 << 30


class AdmissionError(ValueError):
    """The tenants do not fit; says which of them would."""


@dataclass(frozen=True)
class Need:
    """Bytes that one tenant takes in each worker.

    Attributes:
        parameters: numbers that train.
        state: their weights, gradients, master weights and moments.
        activations: kept for the backward of one micro-batch, and worked in.
    """

    name: str
    parameters: int
    state: int
    activations: int

    @property
    def total(self) -> int:
        return self.state + self.activations


@dataclass(frozen=True)
class Admission:
    """``base``: bytes of the frozen weights in each worker. ``free``: what a worker may take; None: not known here."""

    base: int
    needs: tuple[Need, ...]
    free: int | None

    @property
    def total(self) -> int:
        return self.base + sum(need.total for need in self.needs)

    @property
    def fitting(self) -> list[str]:
        """Tenants that would fit together, taken in the recipe's order, each if there is still room for it."""
        left, found = (self.free or 0) - self.base, []
        for need in self.needs:
            if need.total <= left:
                left -= need.total
                found.append(need.name)
        return found

    def rows(self) -> Iterator[tuple[str, str]]:
        """For the plan card."""
        yield "tenants", f"{len(self.needs)} on a base of {size(self.base)}, {size(self.total)} in each worker"
        for need in self.needs:
            yield (
                "",
                f"{need.name}: {need.parameters:,} parameters, state {size(need.state)}, "
                f"activations {size(need.activations)}",
            )

    def check(self) -> None:
        """Raises AdmissionError if the tenants need more than is free."""
        if self.free is None or self.total <= self.free:
            return
        each = ", ".join(f"{need.name} {size(need.total)}" for need in self.needs)
        fitting = self.fitting
        would = f"{', '.join(fitting)} would fit: take out the others" if fitting else "none of them would fit"
        raise AdmissionError(
            f"tenants: they need {size(self.total)} in each worker (base {size(self.base)}, {each}), and "
            f"{size(self.free)} are free; {would}, or lower micro_batch_size, data.sequence_length or r; "
            "parallel.memory_gib says how much a worker may take"
        )


def admitted(events: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a start of the run that wrote these events found room for its tenants, so that none is asked again."""
    return any(row["kind"] == "admitted" for row in events)


def admit(recipe: Recipe, shapes: Shapes, active: int, width: int, heads: int, free: int | None) -> Admission:
    """The estimate for a resolved recipe with tenants.

    Args:
        shapes: of the base's parameters, by name; ``active``: routed experts of a token.
        width: bytes of a number in the training dtype; ``heads``: of the attention.
        free: bytes that one worker may take, unless ``parallel.memory_gib`` says it.
    """
    wanted = recipe.parallel.memory_gib
    if wanted != "auto":
        free = int(wanted * _GIB)
    model = model_shapes(shapes, active)
    placed = model.resolve(recipe.adapter)
    trained = sum(parameters(here, site, one.path.rpartition(".")[2]).total for one, here, site in placed)
    base = sum(map(prod, shapes.values())) * width
    vocabulary = next((shape[0] for name, shape in shapes.items() if name.endswith("embed_tokens.weight")), 0)
    optimizer = state_width(recipe.train.optimizer)
    needs = []
    for name, batch in zip(recipe.tenants, micro_batches(recipe, width, heads, vocabulary), strict=True):
        state = trained * (2 * width) + -(-trained // recipe.parallel.workers) * (optimizer + _FP32)
        kept = sum(saved_bytes(model, placed, batch).values()) + working_bytes(placed, batch)
        needs.append(Need(name, trained, state, kept))
    return Admission(base, tuple(needs), free)
