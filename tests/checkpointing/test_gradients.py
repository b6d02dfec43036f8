"""The tap on ZeRO's steps: what is logged is what was there before clipping, also where one pass scales and sums."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from checkpointing.record_sums import GradientSums
from checkpointing.state.gradients import GradientTap, LogError, StepLog
from trainer.clipping import GroupClip, NormClip

SIZES = (64, 96)  # of two parameter groups' partitions


class Zero:
    """As much of DeepSpeed's ZeRO optimizer as a step takes: flatten, cast, clip, update, one group after another."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.single_partition_of_fp32_groups = [torch.randn(size).requires_grad_() for size in SIZES]
        self.optimizer = torch.optim.AdamW([{"params": [flat]} for flat in self.single_partition_of_fp32_groups], 0.1)
        self.partition_size, self.gradient_accumulation_dtype = list(SIZES), torch.bfloat16
        self.clip_grad, self.consumed = 0.5, list[torch.Tensor]()
        self.flatten = torch.cat

    def scaled_global_norm(self) -> torch.Tensor:
        return torch.tensor(3.0)

    def _get_preflattened_grad_partition(self, group: int) -> None:
        return None

    def unscale_and_clip_grads(self, grads, norm) -> None:
        raise AssertionError("the clips replace it")

    def step(self, averaged) -> None:
        norm = self.scaled_global_norm()
        for group, flat in enumerate(self.single_partition_of_fp32_groups):
            flat.grad = self.flatten(averaged[group]).to(flat.dtype)
            self.unscale_and_clip_grads([flat.grad], norm)
            self.consumed.append(flat.grad.clone())
            self.optimizer.param_groups[group]["params"] = [flat]
            others = [other.grad for other in self.single_partition_of_fp32_groups]
            for other in self.single_partition_of_fp32_groups:
                other.grad = flat.grad if other is flat else None
            self.optimizer.step()
            for other, grad in zip(self.single_partition_of_fp32_groups, others, strict=True):
                other.grad = None if other is flat else grad


def run(clip: str, in_one_pass: bool, spoil: bool = False) -> tuple[Zero, list[StepLog], list]:
    """Three steps; the gradients that each began with."""
    zero = Zero()
    if clip == "norm":
        NormClip(SimpleNamespace(optimizer=zero))
    else:
        GroupClip(SimpleNamespace(optimizer=zero)).scale(1, norm=4.0, most=0.25)
    tap = GradientTap(zero)
    if in_one_pass:
        tap._summing = Reference(spoil)
    logs, began = [], []
    for step in range(3):
        torch.manual_seed(1 + step)
        averaged = [[torch.randn(size // 2).bfloat16() for _ in range(2)] for size in SIZES]
        began.append([torch.cat(parts).clone() for parts in averaged])
        zero.step(averaged)
        logs.append(tap.take())
    return zero, logs, began


class Reference(GradientSums):
    """The kernel's product by torch; ``spoil``: it writes half of it."""

    def __init__(self, spoil: bool) -> None:
        self.spoil, self._works = spoil, True

    def can(self, source, out) -> bool:
        return self._works

    def scale(self, source, factor, out, check):
        def scale_and_add(source, factor, out):
            half = len(out) // 2 if self.spoil else len(out)
            out[:half] = source[:half].float() * factor
            return torch.zeros(1, 8, dtype=torch.uint64)

        with pytest.MonkeyPatch.context() as patch:
            kernels = SimpleNamespace(scale_and_add=scale_and_add)  # the real module needs Triton
            patch.setitem(sys.modules, "checkpointing.device_sums", kernels)
            return super().scale(source, factor, out, check)


@pytest.mark.parametrize("clip", ["norm", "group"])
@pytest.mark.parametrize("in_one_pass", [False, True])
def test_what_is_logged_times_its_factor_is_what_the_optimizer_consumed(clip, in_one_pass):
    zero, logs, began = run(clip, in_one_pass)
    plain, _, _ = run(clip, False)
    consumed = iter(zero.consumed)
    for log, flats in zip(logs, began, strict=True):
        assert [sums is not None for sums in log.sums] == [in_one_pass] * 2
        for flat, grad, factor in zip(flats, log.grads, log.factors, strict=True):
            assert torch.equal(grad, flat), "logged as it was before clipping"
            assert torch.equal(grad.float() * factor, next(consumed))
    assert float(logs[0].factors[1]) < 1, "clipping has something to do"
    for ours, theirs in zip(zero.single_partition_of_fp32_groups, plain.single_partition_of_fp32_groups, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("clip", ["norm", "group"])
def test_a_product_that_is_not_torchs_is_made_again_also_where_nothing_is_clipped(clip, capsys):
    """The first group of ``group`` has the factor 1, whose product is what the cast left there."""
    zero, logs, _ = run(clip, True, spoil=True)
    plain, _, _ = run(clip, False)
    assert "another product than torch's" in capsys.readouterr().err
    assert all(sums is None for log in logs for sums in log.sums)
    for ours, theirs in zip(zero.consumed, plain.consumed, strict=True):
        assert torch.equal(ours, theirs)


def test_gradients_that_are_no_numbers_are_none_of_the_logs_business():
    """The loop ends the run for them, with other advice."""
    zero = Zero()
    NormClip(SimpleNamespace(optimizer=zero))
    tap = GradientTap(zero)
    flat = tap._on_flatten([torch.full((SIZES[0],), float("nan")).bfloat16()])
    tap._on_clip([flat.float()], torch.tensor(float("inf")))
    assert len(tap._grads) == 1


def test_other_gradients_than_were_reduced_are_refused():
    zero = Zero()
    NormClip(SimpleNamespace(optimizer=zero))
    tap = GradientTap(zero)
    tap._on_flatten([torch.randn(SIZES[0]).bfloat16()])
    with pytest.raises(LogError, match="consumes other gradients"):
        tap._on_clip([torch.randn(SIZES[0])], torch.tensor(1.0))
