"""Several adapters on one frozen base, trained in one pass, each on its own rows of the batch.

Every tenant has the same banks with factors of its own, which start as they would if it trained alone with its seed.
Whose rows are whose the loop says in :class:`moe.context.Slots`. The idea of one base pass for the batches of many jobs
is mLoRA's (VLDB 2025).

Shapes: N rows sorted by (expert, tenant), A tenants, L experts, R rank, M inputs, O outputs, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.attach import Attacher, AttachReport, attach
from lora.config import BankAt, BankConfig
from lora.errors import AdapterError
from lora.experts import ExpertLoRA, ExpertSlice
from lora.factors import stacked_init
from lora.sites import Frame, global_size
from lora.targets import Placed
from lora.tenant_products import Factors, add_deltas, dropped, frozen_products, groups_of
from lora.tenant_rules import PREFIX, alone, refused
from moe.assignment import Assignment
from moe.context import Slots, current
from moe.families import MoEBlock
from moe.kernels.activation import between
from moe.refs import TensorAddress


@dataclass(frozen=True)
class Tenant:
    """One adapter of several; ``seed`` is what its factors start from."""

    name: str
    seed: int


class LowRank(nn.Module):
    """A [1,R,M] and B [1,O,R] of one tenant on one linear layer."""

    def __init__(self, path: str, owner: str, base: nn.Linear, bank: BankAt, seed: int) -> None:
        super().__init__()
        self.scale, self.dropout = bank.scale, bank.config.dropout or 0.0
        place = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.A = nn.Parameter(stacked_init(1, 0, (bank.r, base.in_features), f"{seed}/{path}/A").to(**place))
        self.B = nn.Parameter(torch.zeros(1, base.out_features, bank.r, **place))
        for name in ("A", "B"):
            parameter = getattr(self, name)
            parameter.address = TensorAddress(f"{path}.{owner}.{name}", tuple(parameter.shape))


class TenantLinear(nn.Linear):
    """``y = W x + b + s_a B_a A_a x`` for the rows of each tenant a; the weight and bias of ``base`` themselves."""

    def __init__(self, base: nn.Linear, bank: BankAt, path: str, tenants: Sequence[Tenant]) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.path = base.in_features, base.out_features, path
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.adapter = nn.Module()
        for tenant in tenants:
            owner = PREFIX + tenant.name
            self.adapter.add_module(owner, LowRank(f"{path}.adapter", owner, base, bank, tenant.seed))

    def forward(self, x: Tensor) -> Tensor:
        slots = _slots(self.path)
        x_NM = x.reshape(-1, self.in_features)
        tenants = [Factors(f.A, f.B, f.scale, f.dropout if self.training else 0.0) for f in self.adapter.children()]
        groups = groups_of([slots.rows])
        bounds = _bounds(slots.rows)
        into_NM = dropped(x_NM, tenants, bounds, [f"{stream}/{self.path}" for stream in slots.streams])
        y_NO = F.linear(x_NM, self.weight, self.bias)
        counts_LA = _on_device(slots, x.device) if x.is_cuda else torch.empty(0)
        return add_deltas(y_NO, into_NM, tenants, counts_LA, groups).view(*x.shape[:-1], self.out_features)


class TenantExperts(nn.Module):
    """The ``adapter`` of an experts module that holds one :class:`~lora.experts.ExpertLoRA` for each tenant.

    Rows come sorted by expert, and stably: tenants' tokens stand one after another in the batch, so that they are
    sorted by (expert, tenant) already.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.dropouts: dict[str, float] = {}

    def compute(self, experts: nn.Module, x_NH: Tensor, assignment: Assignment) -> Tensor:
        """Every row through its expert and its tenant's adapter of it, unweighted: [N,H]."""
        slots, slot_T = _slots(self.path), current().slot_T
        assert slot_T is not None, "slots without slot_T"
        many, counts_L = len(slots.rows), assignment.counts_L
        local = counts_L.numel()
        expert_N = torch.arange(local, device=x_NH.device).repeat_interleave(counts_L, output_size=x_NH.shape[0])
        slot_N = slot_T[assignment.row_N]
        # The rows are sorted by this key, so where each of its values begins says how many there are, without a wait.
        begins = torch.searchsorted(expert_N * many + slot_N, torch.arange(local * many + 1, device=x_NH.device))
        counts_LA = begins.diff().view(local, many)
        groups = [] if x_NH.is_cuda else groups_of(counts_LA.tolist())
        rows = self._rows(slot_N, slots, assignment)

        def product(name: str, x_NM: Tensor) -> Tensor:
            weight_L, bias_LO = getattr(experts, name), getattr(experts, f"{name}_bias", None)
            weight_LOM = weight_L.transpose(1, 2) if experts.form.transposed else weight_L
            y_NO = frozen_products(x_NM, weight_LOM, counts_LA, groups)
            if bias_LO is not None:
                y_NO = y_NO + bias_LO.repeat_interleave(counts_L, 0, output_size=y_NO.shape[0])
            tenants = self._factors(name)
            if not tenants:
                return y_NO
            into_NM = dropped(x_NM, tenants, rows, [f"{stream}/{self.path}.{name}" for stream in slots.streams])
            return add_deltas(y_NO, into_NM, tenants, counts_LA, groups)

        return product("down_proj", between(product("gate_up_proj", x_NH), experts.form))

    def _rows(self, slot_N: Tensor, slots: Slots, assignment: Assignment) -> list[Tensor]:
        """Where each tenant's rows are, in their order; asked for only where dropout needs it."""
        if not (self.training and any(self.dropouts.values())):
            return []
        order_N = torch.argsort(slot_N, stable=True)
        top_k = assignment.slot_RK.shape[1]
        return list(order_N.split([rows * top_k for rows in slots.rows]))

    def _factors(self, name: str) -> list[Factors]:
        found = [getattr(adapter, name, None) for adapter in self.children()]
        dropout = self.dropouts.get(name, 0.0) if self.training else 0.0
        return [Factors(f.A, f.B, f.scale, dropout) for f in found if f is not None]


def _slots(path: str) -> Slots:
    slots = current().slots
    if slots is None:
        raise AdapterError(f"{path} holds several adapters, and the batch does not say whose its rows are")
    return slots


def _bounds(rows: Sequence[int]) -> list[slice]:
    bounds, start = [], 0
    for count in rows:
        bounds.append(slice(start, start + count))
        start += count
    return bounds


def _on_device(slots: Slots, device: torch.device) -> Tensor:
    """[1, A] rows of each slot, copied once in a pass."""
    kept = current().kept
    if "slot rows" not in kept:
        kept["slot rows"] = torch.tensor([slots.rows]).pin_memory().to(device, non_blocking=True)
    return kept["slot rows"]


def attach_tenants(
    model: nn.Module, banks: Mapping[str, BankConfig], tenants: Sequence[Tenant], blocks: Sequence[MoEBlock]
) -> AttachReport:
    """Freeze ``model`` and give it each bank once for every tenant; see :func:`lora.attach.attach`.

    Raises AdapterError for banks that cannot be trained side by side, and for a target that matches nothing.
    """
    for name, bank in banks.items():
        if reason := refused(bank):
            raise AdapterError(f"adapter.{name}: {reason}")
    sites: dict[str, Attacher] = {"linear": partial(_on_linear, tenants), "experts": partial(_on_experts, tenants)}
    return attach(model, banks, blocks, sites=sites)


def _on_experts(tenants: Sequence[Tenant], _model: nn.Module, placed: Placed, here: BankAt, frame: Frame) -> int:
    experts = frame.blocks[placed.layer].module.experts
    if experts.ep_size != 1:
        raise AdapterError(f"{placed.host} is shared among {experts.ep_size} workers; tenants need all experts in each")
    return _add_tensor(experts, placed.host, placed.path.rpartition(".")[2], placed.layer, here, tenants)


def _add_tensor(experts: nn.Module, path: str, tensor: str, layer: int, here: BankAt, tenants: Sequence[Tenant]) -> int:
    """Every tenant's factors of one stacked tensor; returns how many numbers they have."""
    if experts.adapter is None:
        experts.adapter = TenantExperts(f"{path}.adapter")
    dropout, weight = here.config.dropout or 0.0, getattr(experts, tensor)
    experts.adapter.dropouts[tensor] = dropout
    added = 0
    for tenant in tenants:
        owner = PREFIX + tenant.name
        if not hasattr(experts.adapter, owner):
            part = ExpertSlice(layer, experts.num_experts, 0, experts.num_experts)
            sizes = experts.hidden_size, experts.intermediate_size
            experts.adapter.add_module(owner, ExpertLoRA(f"{path}.adapter.{owner}", part, *sizes))
        adapter = getattr(experts.adapter, owner)
        adapter.add(tensor, here, seed=tenant.seed, device=weight.device, dtype=weight.dtype)
        for parameter in getattr(adapter, tensor).parameters():
            inner = parameter.address.tensor.removeprefix("adapter.")
            parameter.address = replace(parameter.address, tensor=f"adapter.{owner}.{inner}")
        added += global_size(getattr(adapter, tensor).parameters())
    return added


def _on_linear(tenants: Sequence[Tenant], model: nn.Module, placed: Placed, here: BankAt, _frame: Frame) -> int:
    made = TenantLinear(model.get_submodule(placed.path), here, placed.path, tenants)
    model.set_submodule(placed.path, made)
    return global_size(made.adapter.parameters())


def parameters_of(model: nn.Module, tenant: str) -> Iterator[tuple[str, nn.Parameter]]:
    """One tenant's parameters, under the paths that they would have if it trained alone."""
    yield from alone(dict(model.named_parameters()), tenant).items()
