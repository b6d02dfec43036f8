"""Full-rank training of some routed experts (ESFT, arXiv 2407.01906): the chosen ones learn, all else keeps every bit.

The chosen experts of a layer lie in Parameters of their own, one for each run of neighbours, and only these are in the
optimizer: frozen experts have no moments, no master weights, and neither weight decay nor rounding reaches them. The
stacked tensor stays where its users look for it, as a buffer; each forward pass first writes the chosen experts into
it.

Which experts: for each layer, those with the largest shares of the tokens' choices or of their weights, until the
shares add up to p. Shares are of one layer, so that they are a distribution there.

Shapes: L local experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe.experts import Experts
from moe.extend import ExtendError
from moe.families import MoEBlock
from moe.refs import TensorAddress

_STACKED = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")


def select(shares: Sequence[float], p: float) -> tuple[int, ...]:
    """The fewest experts of one layer, by largest share, whose shares of the layer's sum reach ``p``; in order.

    >>> select([0.1, 0.5, 0.1, 0.3], 0.6), select([3, 1], 0.5)
    ((1, 3), (0,))
    """
    total, reached = sum(shares), 0.0
    chosen = []
    for expert in sorted(range(len(shares)), key=lambda e: (-shares[e], e)):
        if reached >= p * total and chosen:
            break
        chosen.append(expert)
        reached += shares[expert]
    return tuple(sorted(chosen))


def train_experts(model: nn.Module, blocks: Sequence[MoEBlock], chosen: Mapping[int, Sequence[int]]) -> None:
    """Freeze the model but for the ``chosen`` experts (global numbers by layer). Call it on a converted, filled model.

    Raises ExtendError for layers or experts that the model does not have, and if none of a worker's experts would
    train: DeepSpeed wants some on every worker.
    """
    layers = {block.layer for block in blocks}
    if unknown := sorted(set(chosen) - layers):
        raise ExtendError(
            f"model.trainable_experts names layer {unknown[0]}; layers with experts are {sorted(layers)}; select again"
        )
    model.requires_grad_(False)
    trained = 0
    for block in blocks:
        experts = block.experts
        assert isinstance(experts, Experts), "convert the model first"
        wanted = sorted(set(chosen.get(block.layer, ())))
        if wanted and not 0 <= wanted[0] <= wanted[-1] < experts.num_experts:
            raise ExtendError(
                f"model.trainable_experts names experts {wanted} of layer {block.layer}, which has "
                f"{experts.num_experts}; select again"
            )
        local = [e - experts.first_expert for e in wanted]
        local = [e for e in local if 0 <= e < experts.num_local_experts]
        trained += len(local)
        if local:
            experts.chosen = _Chosen(experts, list(_runs(local)))
    if not trained:
        first = blocks[0].experts
        raise ExtendError(
            f"model.trainable_experts chooses none of the experts {first.first_expert} to "
            f"{first.first_expert + first.num_local_experts - 1} of any layer, which one worker holds; lower "
            "parallel.ep or select more"
        )


def _runs(experts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[first, last + 1) of each run of neighbours."""
    start = None
    for i, expert in enumerate(experts):
        start = expert if start is None else start
        if i + 1 == len(experts) or experts[i + 1] != expert + 1:
            yield start, expert + 1
            start = None


class _Chosen(nn.Module):
    """The trained experts of one layer, by tensor and first local expert; joined with the frozen ones in each pass."""

    def __init__(self, experts: Experts, runs: list[tuple[int, int]]) -> None:
        super().__init__()
        self.runs = runs
        self.names = [name for name in _STACKED if isinstance(getattr(experts, name, None), nn.Parameter)]
        for name in self.names:
            whole = getattr(experts, name)
            address: TensorAddress = whole.address
            for first, last in runs:
                part = nn.Parameter(whole.detach()[first:last].clone())
                part.address = TensorAddress(
                    address.param, tuple(part.shape), address.layer, address.tensor,
                    address.first_expert + first, address.num_experts,
                )  # fmt: skip
                self.register_parameter(f"{name}_{first}", part)
            delattr(experts, name)
            experts.register_buffer(name, whole.detach(), persistent=False)
        experts.forward = self._joined(experts, experts.forward)  # type: ignore[method-assign]

    def _joined(self, experts: Experts, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*arguments: Any, **named: Any) -> Tensor:
            buffers = {name: experts._buffers[name] for name in self.names}
            try:
                for name, whole in buffers.items():
                    parts = [getattr(self, f"{name}_{first}") for first, _ in self.runs]
                    experts._buffers[name] = _Join.apply(_Held(whole), self.runs, *parts)
                return forward(*arguments, **named)
            finally:
                experts._buffers.update(buffers)

        return run


class _Held:
    """Hides a tensor from autograd, to which it is no input."""

    def __init__(self, whole: Tensor) -> None:
        self.whole = whole


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, held: _Held, runs: list[tuple[int, int]], *parts: Tensor) -> Tensor:
        ctx.runs = runs
        # Through .data: an earlier micro-batch may still hold the tensor for its backward, with these very values.
        whole = held.whole.data
        for (first, last), part in zip(runs, parts, strict=True):
            whole[first:last] = part
        return whole

    @staticmethod
    def backward(ctx: Any, dwhole: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(dwhole[first:last].clone() for first, last in ctx.runs)
