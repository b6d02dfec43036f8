"""Which tenants fit, from sizes alone, before anything is loaded (no torch here).

A worker holds the frozen base once. Every tenant adds its factors, their gradients and optimizer state, and what one of
its micro-batches keeps for the backward pass. Numbers kept for a token are counted per layer: the inputs of norms, the
outputs of linear layers (of attention twice: before and after positions are put in), the adapted layers' inputs, and of
every expert that the token uses its input, pre-activations, activation and output; and at the end its log-probabilities
in fp32. Beside that a pass needs room for what it computes with: as much as one layer keeps, or twice the logits.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from checkpointing.cost import size
from lora.cost import parameters
from trainer.model_shapes import ModelShapes, Shapes, model_shapes
from trainer.schema import Recipe

_MOMENTS_AND_MASTER = 12  # bytes: fp32 weight and two fp32 AdamW moments
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


def admit(recipe: Recipe, shapes: Shapes, active: int, width: int, free: int | None) -> Admission:
    """The estimate for a resolved recipe with tenants.

    Args:
        shapes: of the base's parameters, by name; ``active``: routed experts of a token.
        width: bytes of a number in the training dtype.
        free: bytes that one worker may take, unless ``parallel.memory_gib`` says it.
    """
    wanted = recipe.parallel.memory_gib
    if wanted != "auto":
        free = int(wanted * _GIB)
    model = model_shapes(shapes, active)
    trained = sum(
        parameters(here, site, placed.path.rpartition(".")[2]).total
        for placed, here, site in model.resolve(recipe.adapter)
    )
    kept = kept_per_token(model, shapes, recipe, width)
    base = sum(_numbers(shape) for shape in shapes.values()) * width
    needs = []
    for name, tenant in recipe.tenants.items():
        tokens = (tenant.micro_batch_size or 0) * recipe.data.sequence_length
        state = trained * (2 * width) + -(-trained // recipe.parallel.workers) * (_MOMENTS_AND_MASTER + _FP32)
        needs.append(Need(name, trained, state, tokens * kept))
    return Admission(base, tuple(needs), free)


def kept_per_token(model: ModelShapes, shapes: Shapes, recipe: Recipe, width: int) -> int:
    """Bytes that one token of a micro-batch takes."""
    layers = kept_by_layer(model, shapes, recipe)
    logits = _FP32 * max((shape[0] for name, shape in shapes.items() if "embed_tokens" in name), default=0)
    return width * sum(layers.values()) + logits + max(width * max(layers.values(), default=0), 2 * logits)


def kept_by_layer(model: ModelShapes, shapes: Shapes, recipe: Recipe) -> Mapping[int, int]:
    """Numbers that each layer keeps of a token."""
    kept: dict[int, int] = defaultdict(int)
    for name, shape in shapes.items():
        found = re.search(r"layers\.(\d+)\.", name)
        if found and len(shape) == 1 and "norm" in name:
            kept[int(found[1])] += shape[0]
    for path, (outs, _) in model.linear.items():
        kept[_layer(path)] += outs * (2 if ".self_attn." in path else 1)
    for path, (_, outs, ins) in model.experts.items():
        # gate_up_proj: its input and pre-activations; down_proj: the activation and the output.
        kept[_layer(path)] += model.active * (outs + ins)
    for placed, here, site in model.resolve(recipe.adapter):
        many = model.active if placed.site == "experts" else 1
        kept[placed.layer] += many * here.r + (site.ins if placed.site == "linear" else 0)
    return kept


def _layer(path: str) -> int:
    found = re.search(r"layers\.(\d+)\.", path)
    return int(found[1]) if found else -1


def _numbers(shape: tuple[int, ...]) -> int:
    count = 1
    for axis in shape:
        count *= axis
    return count
