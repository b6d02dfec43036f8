"""Checks of a model in memory: against transformers' own computation, and that everything trains.

The model's weights are rounded to bfloat16 first, so that one set of weights serves both precisions: in fp32, ours must
equal transformers'; in bf16, with the routing of the fp32 pass replayed (a rounding error may otherwise choose another
expert), ours may be no further from the fp32 result than transformers' is.

Shapes: B sequences, S positions, E experts.
"""

from __future__ import annotations

import math
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from moe.convert import convert
from moe.families import MoEBlock, find_moe_blocks
from moe.refs import ExpertRef
from moe.stats import expert_counts
from moe.trace import follow_context
from trainer.doctor_passes import Named, Pass, cast_parameters, distance, grad_distance, random_tokens, run_pass
from trainer.doctor_report import Report

EXACT, ROUNDED = 1e-5, 1.25  # bounds: relative norm in fp32; ours over transformers' in bf16
_ROUNDED = ("logits", "gradients")
NOISE = 1e-6  # of the median parameter's gradient, relative to the weights
_KERNEL = "compare the experts of this layer with moe.kernels.reference; do not train with this backend"


def check_model(model: Any, report: Report, top_k: int) -> list[MoEBlock]:
    """Parity and gradients. ``model`` is transformers' own, fp32 on the CPU; it is converted. Returns its blocks.

    At most the weights and two sets of gradients are held at a time.
    """
    found = find_moe_blocks(model)
    num_experts = found[0].experts.num_experts
    named: Named = list(model.named_parameters())
    ids_BS = random_tokens(model.config, num_experts, top_k)
    follow_context(found)
    _compute_eagerly(model)
    cast_parameters(model, torch.bfloat16)
    cast_parameters(model, torch.float32)
    exact = run_pass(model, found, named, ids_BS)
    theirs = _rounded(model, found, named, ids_BS, exact)
    blocks = convert(model)
    ours = _rounded(model, blocks, named, ids_BS, exact)
    got = run_pass(model, blocks, named, ids_BS)

    _compare_fp32(got, exact, blocks, named, report)
    check_gradients(got, blocks, named, report)
    check_reach(got, blocks, ids_BS, report)
    del exact, got
    if _further(ours, theirs):  # rounding is a matter of luck, too: once in many draws
        report.fact("error bf16 of other tokens", _told(ours, theirs))
        ids_BS = random_tokens(model.config, num_experts, top_k, seed=1)
        _put(found)
        exact = run_pass(model, found, named, ids_BS)
        theirs = _rounded(model, found, named, ids_BS, exact)
        _put(blocks)
        ours = _rounded(model, blocks, named, ids_BS, exact)
    _compare_bf16(ours, theirs, report)
    return blocks


def _compute_eagerly(model: Any) -> None:
    """transformers' plain loop over experts: its grouped products take no width that is not a multiple of 8 in bf16."""
    choose = getattr(model, "set_experts_implementation", None)
    if choose is not None:
        choose("eager")


def _put(blocks: list[MoEBlock]) -> None:
    """Whose experts the model computes with; the parameters are the same."""
    for block in blocks:
        block.module.experts = block.experts


def _rounded(model: Any, blocks: list[MoEBlock], named: Named, ids_BS: Tensor, exact: Pass) -> tuple[float, float]:
    """Relative error in bf16 of the logits, and of all gradients together."""
    cast_parameters(model, torch.bfloat16)
    got = run_pass(model, blocks, named, ids_BS, exact.index)
    cast_parameters(model, torch.float32)
    return distance(got.logits_BSV, exact.logits_BSV), grad_distance(got.grads, exact.grads, exact.grads)


def _further(ours: tuple[float, float], theirs: tuple[float, float]) -> list[int]:
    """Which of our two errors are beyond the bound."""
    return [i for i in (0, 1) if not ours[i] <= ROUNDED * theirs[i]]


def _told(ours: tuple[float, float], theirs: tuple[float, float]) -> list[str]:
    return [
        f"{what}: ours {mine:.2e}, transformers' {reference:.2e}"
        for what, mine, reference in zip(_ROUNDED, ours, theirs, strict=True)
    ]


def _compare_fp32(got: Pass, want: Pass, blocks: list[MoEBlock], named: Named, report: Report) -> None:
    lines, check = [], "parity fp32"
    inside: set[str] = set()
    for block in blocks:
        layer = block.layer
        if not torch.equal(got.index[layer], want.index[layer]):
            differ = int((got.index[layer] != want.index[layer]).any(1).sum())
            report.failed(
                check, f"L{layer:02d}", f"{differ} of {len(want.index[layer])} tokens are routed to other experts",
                "compare the gate's scores with transformers' before going on",
            )  # fmt: skip
        names = [name for name, _ in named if name.startswith(f"{block.path}.")]
        inside.update(names)
        output, grads = distance(got.outputs[layer], want.outputs[layer]), grad_distance(got.grads, want.grads, names)
        lines.append(f"L{layer:02d} output {output:.1e} gradients {grads:.1e}")
        for what, error in (("the block's output", output), ("the block's gradients", grads)):
            if not error <= EXACT:
                report.failed(check, f"L{layer:02d}", f"{what} differ by {error:.1e}, more than {EXACT:.0e}", _KERNEL)
    logits = distance(got.logits_BSV, want.logits_BSV)
    rest = grad_distance(got.grads, want.grads, [name for name, _ in named if name not in inside])
    report.fact("relative norms fp32", [*lines, f"logits {logits:.1e}", f"other gradients {rest:.1e}"])
    for what, error in (("logits", logits), ("gradients outside of MoE blocks", rest)):
        if not error <= EXACT:
            report.failed(check, "", f"{what} differ by {error:.1e}, more than {EXACT:.0e}", _KERNEL)
    report.passed(check, f"logits and gradients are transformers' within {EXACT:.0e}, and every token's experts")


def _compare_bf16(ours: tuple[float, float], theirs: tuple[float, float], report: Report) -> None:
    report.fact("error bf16", _told(ours, theirs))
    for i in _further(ours, theirs):
        report.failed(
            "parity bf16", "", f"{_ROUNDED[i]} are off by {ours[i]:.2e}, transformers' only by {theirs[i]:.2e}",
            "something is rounded too early; train in fp32, or with another backend",
        )  # fmt: skip
    report.passed("parity bf16", f"no further from fp32 than {ROUNDED:g} times transformers' own bf16")


def check_gradients(got: Pass, blocks: list[MoEBlock], named: Named, report: Report) -> None:
    """Silent freezes: what requires a gradient, and got none though its expert saw tokens."""
    check = "gradients"
    stacked: dict[str, MoEBlock] = {}
    for block in blocks:
        if block.layer not in got.index:  # its experts were not called: each tensor counts as one
            continue
        for name, parameter in block.experts.named_parameters(prefix=f"{block.path}.experts", recurse=False):
            if parameter.dim() > 1 and parameter.shape[0] == block.experts.num_experts:
                stacked[name] = block
    relative = {name: _relative(got.grads[name], p) for name, p in named if name in got.grads}
    noise = NOISE * (median(relative.values()) if relative else 0.0)
    later = _from_the_second_step(got, blocks, named)
    if later:
        report.fact("train from the second step", [f"{name}: {factor} is zero" for name, factor in later.items()])
    for name, parameter in named:
        grad = got.grads.get(name)
        if name in later:
            continue
        if grad is None or not bool(grad.any()):
            report.failed(check, name, "got no gradient", f"it will not train; {_reason(parameter)}")
        elif relative[name] < noise:
            report.failed(
                check, name, f"got rounding errors for a gradient ({relative[name]:.1e} of its own size)",
                f"it will not train; {_reason(parameter)}",
            )  # fmt: skip
        elif name in stacked:
            block, counts_E = stacked[name], _counts(got, stacked[name])
            moved_E = grad.flatten(1).any(1)
            for expert in (~moved_E & (counts_E > 0)).nonzero().flatten().tolist():
                report.failed(
                    check, f"{ExpertRef(block.layer, expert)}.{name.rpartition('.')[2]}",
                    f"got no gradient from {int(counts_E[expert])} tokens",
                    f"the expert is frozen; {_reason(parameter.detach()[expert])}",
                )  # fmt: skip
    report.passed(check, f"all {len(named)} parameters train, and every expert that saw tokens")


def _from_the_second_step(got: Pass, blocks: list[MoEBlock], named: Named) -> dict[str, str]:
    """Weights of blocks' shared experts without a gradient, each with the factor of zeros that hides it and has one.

    So an upcycled model begins whose family cannot be without a shared expert (:mod:`moe.upcycle`).
    """
    later: dict[str, str] = {}
    for block in blocks:
        routed = {id(p) for part in (block.module.experts, block.gate) for p in part.parameters()}
        mine = {n: p for n, p in named if n.startswith(f"{block.path}.") and id(p) not in routed}
        still = {name for name in mine if name not in got.grads or not bool(got.grads[name].any())}
        zero = next((name for name, p in mine.items() if name not in still and not bool(p.detach().any())), None)
        if zero is not None:
            later |= dict.fromkeys(sorted(still), zero)
    return later


def _relative(grad: Tensor, parameter: Tensor) -> float:
    """Norm of the gradient over that of the weights; infinite for weights of zero, of which it says nothing."""
    norm = float(parameter.detach().norm())
    return float(grad.norm()) / norm if norm else math.inf


def _reason(weights: Tensor) -> str:
    if not bool(weights.detach().any()):
        return "its weights are all zero, and so are those that would pass it one; load or initialise it again"
    return "look for what detaches it, or for a router whose weights are constant (one expert per token, normalised)"


def _counts(got: Pass, block: MoEBlock) -> Tensor:
    return expert_counts(got.index[block.layer], block.experts.num_experts)


def check_reach(got: Pass, blocks: list[MoEBlock], ids_BS: Tensor, report: Report) -> None:
    """Dead experts: no token chooses them, where dozens should."""
    num_experts = blocks[0].experts.num_experts
    kinds = int(ids_BS.unique().numel())
    if kinds * got.index[blocks[0].layer].shape[1] < 8 * num_experts:
        report.skipped("reach", f"the vocabulary gives only {kinds} different tokens for {num_experts} experts")
        return
    for block in blocks:
        counts_E = _counts(got, block)
        for expert in (counts_E == 0).nonzero().flatten().tolist():
            report.failed(
                "reach", str(ExpertRef(block.layer, expert)),
                f"is dead: none of {ids_BS.numel()} random tokens chose it, {int(counts_E.sum()) // num_experts} "
                "would if all were alike", "look at its row of the router and its correction bias; raise the balance",
            )  # fmt: skip
    report.passed("reach", "every expert is chosen by some token")


def describe(model: nn.Module, top_k: int) -> dict[str, int]:
    """Parameters: ``total``, ``active`` for one token, and of one ``expert``. Works on the meta device."""
    blocks = find_moe_blocks(model)
    total = sum(p.numel() for p in model.parameters())
    routed, one = 0, 0
    for block in blocks:
        size = sum(p.numel() for p in block.experts.parameters())
        one = size // block.experts.num_experts
        routed += size - top_k * one
    return {"total": total, "active": total - routed, "expert": one}
