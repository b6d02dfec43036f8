"""The benchmark of concurrent adapters compares with real PEFT, and notices when it computes something else."""

import pytest
import torch

from benchmarks import lora
from benchmarks.lora_concurrent import cases


@pytest.mark.timeout(120)
def test_tenants_compute_what_peft_computes_for_each_and_both_are_timed():
    for case in cases("tiny", torch.device("cpu"), torch.float32):
        result = lora.measure(case, torch.device("cpu"), rounds=1, until=float("inf"))
        ours = result["rows"]["8 tenants in one pass"]
        assert ours["error"] < 1e-5
        assert ours["tokens"] == result["rows"]["8 PEFT runs, one by one"]["tokens"] == 64
        assert result["rows"]["frozen base, one batch"]["s"] > 0
        assert [claim["what"] for claim in result["claims"]] == ["time"]


def test_a_tenant_that_differs_is_not_timed():
    case = next(cases("tiny", torch.device("cpu"), torch.float32))
    ours = case.arms[1].step.__self__
    path = "model.layers.1.mlp.experts.adapter.down_proj.B"
    with torch.no_grad():
        ours.factors[5][path].mul_(1.5)
    with pytest.raises(lora.Unequal, match=r"tenant 5"):
        lora.parity(case)
