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
NOISE = 1e-6  # of the median parameter's gradient, relative to the weights
_KERNEL = "compare the experts of this layer with moe.kernels.reference; do not train with this backend"


def check_model(model: Any, report: Report, top_k: int) -> list[MoEBlock]:
    """Parity and gradients. ``model`` is transformers' own, fp32 on the CPU; it is converted. Returns its blocks.

    At most the weights and two sets of gradients are held at a time.
    """
    blocks = find_moe_blocks(model)
    num_experts = blocks[0].experts.num_experts
    named: Named = list(model.named_parameters())
    ids_BS = random_tokens(model.config, num_experts, top_k)
    follow_context(blocks)
    cast_parameters(model, torch.bfloat16)
    cast_parameters(model, torch.float32)
    exact = run_pass(model, blocks, named, ids_BS)

    cast_parameters(model, torch.bfloat16)
    theirs = _errors(run_pass(model, blocks, named, ids_BS, exact.index), exact)
    blocks = convert(model)
    ours = _errors(run_pass(model, blocks, named, ids_BS, exact.index), exact)
    cast_parameters(model, torch.float32)
    got = run_pass(model, blocks, named, ids_BS)

    _compare_fp32(got, exact, blocks, named, report)
    _compare_bf16(ours, theirs, report)
    check_gradients(got, blocks, named, report)
    check_reach(got, blocks, ids_BS, report)
    return blocks


def _errors(got: Pass, want: Pass) -> tuple[float, float]:
    """Relative error of the logits, and of all gradients together."""
    return distance(got.logits_BSV, want.logits_BSV), grad_distance(got.grads, want.grads, want.grads)


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
    for what, mine, reference in zip(("logits", "gradients"), ours, theirs, strict=True):
        report.fact(f"error bf16, {what}", f"ours {mine:.2e}, transformers' {reference:.2e}")
        if not mine <= ROUNDED * reference:
            report.failed(
                "parity bf16", "", f"{what} are off by {mine:.2e}, transformers' only by {reference:.2e}",
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
    for name, parameter in named:
        grad = got.grads.get(name)
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
