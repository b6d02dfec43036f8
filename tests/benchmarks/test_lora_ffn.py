"""The published MixLoRA loop that ours is measured against computes the same, gradients included, and keeps more."""

import torch

from benchmarks.lora import parity, saved_bytes
from benchmarks.lora_ffn import cases


def test_the_loop_and_ours_are_equal_and_ours_keeps_less():
    (case,) = cases("tiny", torch.device("cpu"), torch.float32)
    loop, floor, ours = case.arms
    factors = {f"{name}.{kind}" for name in ("gate_proj", "up_proj", "down_proj") for kind in "AB"}
    assert set(loop.step(True)) == set(ours.step(True)) == {"y", "dx", "router"} | factors
    assert (loop.role, floor.role, ours.role) == ("peer", "floor", "ours")
    assert max(parity(case).values()) < 1e-5
    assert all(value.abs().max() > 0 for value in ours.step(True).values())
    assert saved_bytes(ours) < 0.6 * saved_bytes(loop)
