"""Soft MoE (Puigcerver et al. 2023, "From Sparse to Soft Mixtures of Experts"): experts see mixtures of tokens.

Every expert has P slots. A slot's input is an average of all tokens of its sequence, a token's output an average of all
slots; the two softmaxes are over the same logits, in the two directions, so everything is differentiable and nothing
is dropped. Tokens and slot vectors are normalised before their product (section 2.3). **A token's output depends on
later tokens**, so a causal language model trained with it learns to look at what it is to predict.

Also here: replacing a converted model's MoE blocks by such a block. Its experts keep their names and addresses, and
its parameters are checkpointed as any.

Shapes: B sequences, S positions, H hidden, I intermediate, E experts, P slots of each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.convert import assign_addresses
from moe.experts import Experts
from moe.families import FamilyError, MoEBlock
from moe.form import ExpertForm
from moe.kernels.activation import between


class StackedExperts(nn.Module):
    """A family's stacked weights, without routing: ``gate_up_proj`` [E,2I,H] and ``down_proj`` [E,H,I]."""

    def __init__(self, gate_up_proj: nn.Parameter, down_proj: nn.Parameter, form: ExpertForm) -> None:
        super().__init__()
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj
        self.form = form

    @property
    def num_experts(self) -> int:
        return self.gate_up_proj.shape[0]

    def forward(self, x_BEPH: Tensor) -> Tensor:
        """Row p of expert e through expert e."""
        h_BEP2I = torch.einsum("beph,eih->bepi", x_BEPH, self.gate_up_proj)
        return torch.einsum("bepi,ehi->beph", between(h_BEP2I, self.form), self.down_proj)


class SoftMoE(nn.Module):
    """Replaces an MoE block: [B,S,H] -> [B,S,H].

    Args:
        slots: P, of every expert.
        seed: of the slots' vectors, drawn with standard deviation 1/sqrt(H).
    """

    def __init__(self, block: MoEBlock, slots: int, seed: int) -> None:
        super().__init__()
        self.experts = stacked_experts(block)
        self.slots = slots
        weight = self.experts.gate_up_proj
        hidden, count = weight.shape[2], self.experts.num_experts * slots
        digest = hashlib.sha256(f"{seed}:soft.{block.layer}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        vectors_HM = torch.randn(hidden, count, generator=generator) / hidden**0.5
        self.slot_vectors = nn.Parameter(vectors_HM.to(weight.device, weight.dtype))
        self.slot_scale = nn.Parameter(torch.ones(1, device=weight.device, dtype=weight.dtype))

    def forward(self, x_BSH: Tensor) -> Tensor:
        vectors_HM = self.slot_scale * F.normalize(self.slot_vectors, dim=0)
        logits_BSM = (F.normalize(x_BSH, dim=-1) @ vectors_HM).float()
        dispatch_BSM = logits_BSM.softmax(1).to(x_BSH.dtype)
        combine_BSM = logits_BSM.softmax(2).to(x_BSH.dtype)
        slots_BMH = dispatch_BSM.transpose(1, 2) @ x_BSH
        y_BEPH = self.experts(slots_BMH.unflatten(1, (-1, self.slots)))
        return combine_BSM @ y_BEPH.flatten(1, 2)


def stacked_experts(block: MoEBlock) -> StackedExperts:
    """A converted block's own parameters, reused. Raises FamilyError for what the products here cannot express."""
    experts = block.experts
    assert isinstance(experts, Experts), "convert the model first"
    if experts.form.transposed or len(list(experts.parameters())) != 2:
        raise FamilyError(f"{block.path}: transposed or biased experts cannot be mixed softly; use another family")
    for name in ("shared_expert", "shared_experts"):
        if getattr(block.module, name, None) is not None:
            raise FamilyError(f"{block.path} has {name}, which replacing the block would lose; use another family")
    return StackedExperts(experts.gate_up_proj, experts.down_proj, experts.form)


def replace_blocks(model: nn.Module, blocks: list[MoEBlock], make: Callable[[MoEBlock], nn.Module]) -> list[nn.Module]:
    """Put ``make(block)`` in each converted block's place, and address what is new; returns what was put.

    Raises FamilyError if ``make`` refuses a block; the model is then unchanged.
    """
    made = [make(block) for block in blocks]
    for block, new in zip(blocks, made, strict=True):
        parent, _, name = block.path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)
    assign_addresses(model)
    return made
