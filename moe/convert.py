"""Swap a transformers model's experts for ours, expert-parallel. The gates are the business of :mod:`moe.gates`.

>>> # model = new_model("mixtral", sizes, vocab_size=32000, seed=0, dtype=torch.bfloat16)
>>> # blocks = convert(model, Layout(world=2, ep=2), rank=0)
"""

from __future__ import annotations

from torch import nn
from transformers.activations import ACT2FN

from moe.experts import Experts
from moe.families import FamilyError, MoEBlock, check_family, find_moe_blocks
from moe.form import ExpertForm
from moe.layout import Layout
from moe.refs import TensorAddress

_BIASES = ("gate_up_proj_bias", "down_proj_bias")
_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


def convert(model: nn.Module, layout: Layout | None = None, rank: int = 0) -> list[MoEBlock]:
    """Replace every MoE block's experts by :class:`~moe.experts.Experts` with this rank's share; address everything.

    With one expert-parallel rank the Parameter objects are reused: nothing is copied.

    Returns the blocks with their new experts. Raises FamilyError if the model has no MoE block we can handle or is of
    another family than those of :mod:`moe.family_table`, ValueError if ``layout.ep`` does not divide the number of
    experts.
    """
    layout = layout or Layout()
    found, blocks = find_moe_blocks(model), []
    check_family(model, found)
    for block in found:
        experts = _local_experts(block, layout, rank)
        block.module.experts = experts
        blocks.append(MoEBlock(block.layer, block.path, block.module, block.gate, experts))
    assign_addresses(model)
    return blocks


def _local_experts(block: MoEBlock, layout: Layout, rank: int) -> Experts:
    source = block.experts
    where = f"{block.path}.experts ({type(source).__name__})"
    form = form_of(source, where)
    parts = [getattr(source, name, None) for name in ("gate_up_proj", "down_proj", *_BIASES)]
    mine = layout.local_experts(rank, parts[0].shape[0])
    if layout.ep > 1:
        parts = [None if part is None else _slice(part, mine) for part in parts]
    gate_up, down, gate_up_bias, down_bias = parts
    return Experts(
        gate_up,
        down,
        form,
        layer=block.layer,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        first_expert=mine.start,
        num_experts=layout.ep * len(mine),
    )


def _slice(stacked_E: nn.Parameter, mine: range) -> nn.Parameter:
    return nn.Parameter(stacked_E.detach()[mine.start : mine.stop].clone(), requires_grad=stacked_E.requires_grad)


def form_of(experts: nn.Module, where: str) -> ExpertForm:
    """How a transformers module lays its experts out. Raises FamilyError with what was looked for and found."""
    gate_up, down = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    if not isinstance(gate_up, nn.Parameter) or not isinstance(down, nn.Parameter) or gate_up.dim() != 3:
        raise FamilyError(f"{where}: looked for stacked gate_up_proj and down_proj parameters, found {_names(experts)}")
    transposed = bool(getattr(experts, "is_transposed", False))
    two_i, i = (gate_up.shape[2], down.shape[1]) if transposed else (gate_up.shape[1], down.shape[2])
    biased = isinstance(getattr(experts, _BIASES[0], None), nn.Parameter)
    if two_i != 2 * i or biased != bool(getattr(experts, "has_bias", False)):
        raise FamilyError(
            f"{where}: expected gate_up_proj [E,2I,H] and down_proj [E,H,I], or both transposed, with biases if it "
            f"says so; found {_names(experts)}"
        )
    limit = getattr(experts, "limit", None)
    return ExpertForm(
        transposed=transposed,
        interleaved=not getattr(experts, "is_concatenated", True),
        act="silu" if limit is not None else _name_of(getattr(experts, "act_fn", None), where),
        limit=limit,
        alpha=getattr(experts, "alpha", ExpertForm.alpha),
    )


def _name_of(act: object, where: str) -> str:
    """An activation's name among transformers' ACT2FN."""
    for name in ACT2FN:
        if type(ACT2FN[name]) is type(act) and name in _ACTIVATIONS:
            return name
    raise FamilyError(f"{where}: its activation is {act!r}; known are {', '.join(_ACTIVATIONS)}")


def _names(module: nn.Module) -> str:
    return ", ".join(f"{name} {tuple(p.shape)}" for name, p in module.named_parameters()) or "no parameters"


def assign_addresses(model: nn.Module) -> None:
    """Give every parameter that has none an ``address`` (:class:`~moe.refs.TensorAddress`)."""
    experts_at = {path: m for path, m in model.named_modules() if isinstance(m, Experts)}
    for path, parameter in model.named_parameters():
        if getattr(parameter, "address", None) is not None:
            continue
        parent, _, tensor = path.rpartition(".")
        experts = experts_at.get(parent)
        if experts is None:
            parameter.address = TensorAddress(path, tuple(parameter.shape))
        else:
            parameter.address = TensorAddress(
                path, tuple(parameter.shape), experts.layer, tensor, experts.first_expert, experts.num_experts
            )
