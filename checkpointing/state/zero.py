"""Live DeepSpeed ZeRO-1/2 state as named ranges.

ZeRO keeps, per parameter group, one flat fp32 partition of master weights and, per inner-optimizer state, one tensor
of the same length. Which elements of which parameter lie where is recorded on each parameter's ``_hp_mapping``. Here
that is turned round: every flat tensor becomes a :class:`StateBuffer` whose spans carry names that do not depend on
ranks.
"""

from __future__ import annotations

from typing import Any

import torch

from checkpointing.state.buffers import StateBuffer, StateSpan
from checkpointing.state.optimizers import counts_steps, moments_of
from checkpointing.units import Range
from moe.refs import TensorAddress


def materialise_moments(zero_optimizer: Any) -> None:
    """Create the state that the optimizer would create in its first step, so that it can be captured and restored."""
    inner = zero_optimizer.optimizer
    for flat in zero_optimizer.single_partition_of_fp32_groups:
        state = inner.state[flat]
        if not state:
            if counts_steps(inner):
                state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device if _fused(inner) else "cpu")
            for moment in moments_of(inner):
                state[moment] = torch.zeros_like(flat.data)
    zero_optimizer._lazy_init_hp_params_optimizer_state()


def _fused(inner: torch.optim.Optimizer) -> bool:
    return bool(inner.defaults.get("fused") or inner.defaults.get("capturable"))


def zero_buffers(zero_optimizer: Any) -> list[StateBuffer]:
    """All of this rank's optimizer state: master weights and moments of every parameter group, in group order."""
    materialise_moments(zero_optimizer)
    moments = moments_of(zero_optimizer.optimizer)
    buffers = []
    for i, flat in enumerate(zero_optimizer.single_partition_of_fp32_groups):
        spans = _partition_spans(zero_optimizer.bit16_groups[i])
        state = zero_optimizer.optimizer.state[flat]
        for kind, tensor in [("master", flat.data), *((m, state[m]) for m in moments)]:
            named = tuple(StateSpan(Range(unit, kind, lo, hi), offset) for unit, lo, hi, offset in spans)
            buffers.append(StateBuffer(f"group{i}.{kind}", tensor, named))
    return buffers


def _partition_spans(params: list[torch.nn.Parameter]) -> list[tuple[str, int, int, int]]:
    """(unit, lo, hi, offset into the flat partition) for the parts of ``params`` that lie in this rank's partition."""
    spans = []
    for param in params:
        mapping = param._hp_mapping
        if mapping is None:
            continue
        address: TensorAddress = param.address
        first = mapping.lp_fragment_address.start
        last = first + mapping.lp_fragment_address.numel
        for unit in address.units():
            lo, hi = max(first, unit.start), min(last, unit.stop)
            if lo < hi:
                offset = mapping.hp_fragment_address.start + lo - first
                spans.append((unit.unit, lo - unit.start, hi - unit.start, offset))
    return spans


def optimizer_steps(zero_optimizer: Any) -> list[float]:
    """The inner optimizer's step count, per parameter group; 0 always of one that counts none."""
    inner = zero_optimizer.optimizer
    return [float(inner.state[flat].get("step", 0.0)) for flat in zero_optimizer.single_partition_of_fp32_groups]


def after_restore(zero_optimizer: Any, steps: list[float]) -> None:
    """Finish a restore into :func:`zero_buffers`: set the step counts and rebuild the model's weights from the masters.

    A collective: every rank must call it.
    """
    inner = zero_optimizer.optimizer
    for flat, step in zip(zero_optimizer.single_partition_of_fp32_groups, steps, strict=True):
        if "step" in inner.state[flat]:
            inner.state[flat]["step"].fill_(step)
    zero_optimizer.update_lp_params()


def describe_tensors(zero_optimizer: Any) -> dict[str, dict[str, Any]]:
    """What a reader needs to turn units back into parameters: unit -> parameter path, global shape, expert, dtype."""
    described = {}
    for group in zero_optimizer.bit16_groups:
        for param in group:
            address = param.address
            for i, span in enumerate(address.units()):
                described[span.unit] = {
                    "param": address.param,
                    "shape": list(address.global_shape),
                    "expert": address.first_expert + i if address.is_expert else None,
                    "elements": span.stop - span.start,
                    "dtype": str(param.dtype).removeprefix("torch."),
                }
    return described
