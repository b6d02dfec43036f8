"""Several adapters in one pass: each module computes all rows, and an adapter adds to its own.

Rows stand adapter after adapter (:attr:`inference.rows.Rows.shares`). Frozen products are made once for all of them, so
that weights are read, and missing experts fetched, once for a step and not once for each adapter in it. The adapters'
own modules, whatever their kind, are called on their rows as they are in a pass of their own.

Shapes: R rows of all adapters, M inputs, O outputs; N = R*K rows sorted by expert, K choices, E experts, H hidden, I
intermediate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inference.rows import under_way
from lora.ffn import MixedFfn
from lora.linear import RoutedLinear

if TYPE_CHECKING:
    from inference.experts import Call

Name = str | None
Value = TypeVar("Value")


def shares(of: Mapping[Name, Value]) -> Iterator[tuple[Value, slice]]:
    """What is there for the adapters that have rows in the pass under way, and their rows."""
    passed, start = under_way(), 0
    assert passed is not None
    assert passed.shares, "a pass that does not say whose its rows are"
    for name, rows in passed.shares:
        if name in of:
            yield of[name], slice(start, start + rows)
        start += rows


class AdaptedLinear(nn.Module):
    """``W x + b`` for all rows, and each adapter's delta for its own.

    Args:
        adapters: by name; whose rows are others' get none.
    """

    def __init__(self, base: nn.Linear, adapters: Mapping[Name, nn.Module]) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self._of = dict(adapters)  # a dict's modules stay their trees' own

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        x_RM, y_RO = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for adapter, here in shares(self._of):
            y_RO[here] = adapter(x_RM[here], y_RO[here])
        return y


class ApartBlocks(nn.Module):
    """A feed-forward block that each adapter computes its own way: one module for each name, on its rows."""

    def __init__(self, blocks: Mapping[Name, nn.Module]) -> None:
        super().__init__()
        self._of = dict(blocks)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([block(x[..., here, :]) for block, here in shares(self._of)], dim=-2)


class AdaptedExperts(nn.Module):
    """The ``adapter`` of routed experts that serve the rows of several."""

    def __init__(self, adapters: Mapping[Name, nn.Module]) -> None:
        super().__init__()
        self._of = dict(adapters)

    @property
    def present(self) -> bool:
        """Whether any of them has rows in the pass under way."""
        return any(True for _ in shares(self._of))

    def bound(self, call: Call) -> BoundAdapters:
        """As the adapter of one call; there must be one :attr:`present`."""
        token_N, expert_N = call.token_N, np.repeat(call.experts, call.counts)
        found = []
        for adapter, here in shares(self._of):
            row_n = np.flatnonzero((token_N >= here.start) & (token_N < here.stop))
            counts_E = np.bincount(expert_N[row_n], minlength=adapter.num_experts)
            found.append((adapter, torch.from_numpy(row_n), torch.from_numpy(counts_E)))
        return BoundAdapters(found)


class BoundAdapters:
    """Deltas of a call's rows, which :class:`inference.experts.OffloadedExperts` asks for as of one adapter."""

    def __init__(self, parts: list[tuple[nn.Module, Tensor, Tensor]]) -> None:
        self._parts = parts

    def gate_up_delta(self, x_NH: Tensor, counts_E: Tensor) -> Tensor:
        return self._joined(x_NH, lambda adapter, *its: adapter.gate_up_delta(*its), lambda a: 2 * a.intermediate)

    def down_delta(self, a_NI: Tensor, counts_E: Tensor) -> Tensor:
        return self._joined(a_NI, lambda adapter, *its: adapter.down_delta(*its), lambda a: a.hidden)

    def _joined(
        self, x_NM: Tensor, delta: Callable[[nn.Module, Tensor, Tensor], Tensor], width: Callable[[nn.Module], int]
    ) -> Tensor:
        """[N,O]; zero for rows of nobody here."""
        y_NO = x_NM.new_zeros(len(x_NM), width(self._parts[0][0]))
        for adapter, row_n, counts_E in self._parts:
            row_n = row_n.to(x_NM.device)
            y_NO[row_n] = delta(adapter, x_NM[row_n], counts_E.to(x_NM.device)).to(y_NO.dtype)
        return y_NO


def obstacle(tree: nn.Module) -> str:
    """Why an adapted tree cannot share a pass with others; empty if it can."""
    for path, module in tree.named_modules():
        if getattr(module, "adapter", None) is None:
            continue
        if path.endswith(".kv_b_proj"):
            return f"{path} is computed for keys of the past, too, not for rows alone"
        if not isinstance(module, RoutedLinear | MixedFfn) and not hasattr(module.adapter, "gate_up_delta"):
            return f"{path} has its adapter beside a whole block"
    return ""


def join_trees(joint: nn.Module, trees: Mapping[Name, nn.Module]) -> None:
    """Has ``joint``, a tree without adapters over the same weights, serve the rows of all ``trees``.

    Args:
        trees: by adapter; that of the base model, which has none, under None.
    """
    places: dict[str, dict[Name, nn.Module]] = {}
    for name, tree in trees.items():
        for path, module in tree.named_modules():
            if getattr(module, "adapter", None) is not None:
                places.setdefault(path, {})[name] = module
    blocks = {path for path, adapted in places.items() if any(isinstance(m, MixedFfn) for m in adapted.values())}
    for path, adapted in places.items():
        if path in blocks:
            joint.set_submodule(path, ApartBlocks({name: tree.get_submodule(path) for name, tree in trees.items()}))
        elif path.rpartition(".")[0] in blocks:
            continue  # one of a block's own projections
        elif isinstance(next(iter(adapted.values())), RoutedLinear):
            own = joint.get_submodule(path)
            joint.set_submodule(path, AdaptedLinear(own, {name: m.adapter for name, m in adapted.items()}))
        else:
            joint.get_submodule(path).adapter = AdaptedExperts({name: m.adapter for name, m in adapted.items()})
