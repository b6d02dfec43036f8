"""The published loops that routed banks are measured against compute the same, gradients included."""

import pytest
import torch

from benchmarks.lora import parity
from benchmarks.lora_routed import SIZES, cases


@pytest.mark.parametrize("number", range(len(SIZES["tiny"])))
def test_loops_and_ours_are_equal(number):
    case = list(cases("tiny", torch.device("cpu"), torch.float32))[number]
    floor, loop, ours = case.arms
    keys = {"out", "dx", "d A", "d B"} | (set() if loop.name == "PEFT" else {"d router"})
    assert set(loop.step(True)) == set(ours.step(True)) == keys
    assert floor.role == "floor"
    assert max(parity(case).values()) < 1e-5
