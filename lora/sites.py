"""What all kinds of sites share: the frame they are attached in, what is said of each place, and how it is watched.

An adapter is a submodule called ``adapter`` of the module that it adapts, its *host*. So that :mod:`lora.watch` can
prove that it trains, it is :class:`Probed`:

* ``probes()`` names, in a fixed order, the parameters that must get a gradient as soon as a token with loss passes
  through the host: every B, since A and the routers get none while B is zero, and whatever else the output hangs on
  from the first step. Names are paths inside the adapter: ``B``, ``down_proj.B``.
* A parameter whose ``address`` is an expert's (``num_experts`` above 0) is judged expert by expert, along its first
  axis, by global expert. Any other is judged expert by expert if the adapter reports gates, and as a whole if not.
* Who used which expert is known for hosts that are called as ``host(hidden_states, top_k_index, top_k_weights)``.
  Any other adapter with experts of its own has an attribute ``observe``, None at first. The watch sets it; while it is
  set, each forward pass of the adapter calls ``observe(gate_TE)`` with its gates [T, E]: one row for each token of the
  host's output, in its order, one column for each expert on the first axis of its probes; exactly zero where a token
  does not use an expert. An expert that no token with loss used is not expected to have a gradient. The tensor is
  detached by the watch; nothing may depend on the call.
* Probes that all tokens use (shared factors, one expert without a router) have a first axis of 1 beside gates of
  several experts, or belong to an adapter without ``observe``. An adapter with one expert that some tokens do not use,
  as where a prompt chooses among modules, reports gates [T, 1].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol, runtime_checkable

from torch import nn

from moe.families import MoEBlock


@runtime_checkable
class Probed(Protocol):
    """What an adapter offers to the watch; this module's docstring says what is promised."""

    def probes(self) -> list[tuple[str, nn.Parameter]]: ...


@dataclass(frozen=True)
class Match:
    """One place that a bank was put on; ``path`` is the adapted module's, ``parameters`` counts over all experts."""

    bank: str
    path: str
    target: str
    parameters: int
    site: str
    num_experts: int
    r: int


@dataclass(frozen=True)
class Frame:
    """What holds for the whole model: the seed, the expert-parallel degree, MoE blocks by layer, the hidden size."""

    seed: int
    ep: int
    blocks: Mapping[int, MoEBlock]
    hidden: int = 0


def global_size(parameters: Iterable[nn.Parameter]) -> int:
    """Numbers in the parameters, over all ranks."""
    return sum(prod(p.address.global_shape) if hasattr(p, "address") else p.numel() for p in parameters)
