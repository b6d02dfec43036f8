"""The driver of benchmarks.lora compares before it times, and its expert arms compute the same as PEFT."""

import json
import sys

import pytest
import torch

from benchmarks import lora
from benchmarks.lora_case import Arm, Case, Claim
from benchmarks.lora_experts import SIZES, cases

CPU = torch.device("cpu")


def arm(name, value, **more):
    return Arm(name, lambda check: {"out": torch.tensor([1.0, value])}, **more)


def test_arms_that_compute_something_else_end_the_case():
    case = Case("a case", [arm("peer", 2.0, role="peer"), arm("mine", 2.1)], tolerance=1e-3)
    with pytest.raises(lora.Unequal, match=r"a case: mine: out is off by 4\.5e-02, over 1e-03"):
        lora.measure(case, CPU, 1, float("inf"))
    broken = Case("a case", [arm("peer", 2.0, role="peer"), arm("mine", float("nan"))])
    with pytest.raises(lora.Unequal, match="mine: out is off by nan"):
        lora.parity(broken)
    other = Arm("mine", lambda check: {"y": torch.ones(2)})
    with pytest.raises(lora.Unequal, match=r"mine returns \['y'\], not \['out'\]"):
        lora.parity(Case("a case", [arm("peer", 2.0), other]))


def test_a_floor_is_not_compared():
    case = Case("a case", [arm("frozen", 9.0, role="floor", exact=False), arm("peer", 2.0), arm("mine", 2.0)])
    assert lora.parity(case) == {"peer": 0.0, "mine": 0.0}


def test_saved_bytes_are_distinct_storages_without_parameters_and_inputs():
    x, w = torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True)
    # exp keeps its result, which the product keeps as well; x and w are known.
    assert lora.saved_bytes(Arm("a", lambda check: {}, lambda: (x.exp() * w).sum(), [x, w])) == 32
    assert lora.saved_bytes(Arm("a", lambda check: {})) is None


@pytest.mark.parametrize(("ratio", "met"), [(0.5, True), (0.6, False)])
def test_claims_compare_times_per_token_and_bytes(ratio, met):
    rows = {
        "mine": {"s": 4 * ratio, "tokens": 4, "saved_bytes": 1, "peak_bytes": None},
        "peer": {"s": 1.0, "tokens": 1, "saved_bytes": 10, "peak_bytes": None},
    }
    found = lora.judged(Claim("time", "mine", "peer", 0.55), rows)
    assert (found["ratio"], found["met"]) == (ratio, met)
    assert lora.judged(Claim("saved", "mine", "peer", 0.25), rows)["met"]
    assert lora.judged(Claim("peak", "mine", "peer", 1.0), rows)["met"] is None
    assert lora.judged(Claim("time", "mine", "absent", 1.0), rows)["met"] is None


def test_expert_arms_equal_peft_and_keep_less():
    (case,) = cases("tiny", CPU, torch.float32)
    assert len(SIZES["tiny"]) == 1
    names = {"PEFT, eager", "PEFT, grouped_mm", "ours auto", "ours split", "ours fold"}
    errors = lora.parity(case)
    assert set(errors) == names
    assert max(errors.values()) < 1e-5
    saved = {arm.name: lora.saved_bytes(arm) for arm in case.arms}
    assert saved["ours auto"] < 0.25 * saved["PEFT, grouped_mm"]
    named = next(arm for arm in case.arms if arm.name == "ours auto")
    factors = {f"d {t}.{f}" for t in ("gate_up_proj", "down_proj") for f in "AB"}
    assert set(named.step(True)) == {"out", "dx", "d scores"} | factors


def test_the_script_prints_a_table_and_writes_its_figures(monkeypatch, tmp_path, capsys):
    out, threads = tmp_path / "result.json", torch.get_num_threads()
    command = ["lora", "--config", "tiny", "--case", "experts", "--rounds", "2", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    lora.main()
    torch.set_num_threads(threads)
    (found,) = json.loads(out.read_text())["cases"].values()
    assert all(row["s"] > 0 and row["rounds"] == 2 for row in found["rows"].values())
    printed = capsys.readouterr().out
    assert "frozen, ours" in printed
    assert "time of ours auto / PEFT, grouped_mm" in printed


def test_a_config_for_a_gpu_is_refused_without_one(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["lora", "--config", "qwen3"])
    with pytest.raises(SystemExit):
        lora.main()
    assert "needs a CUDA device; use cpu or tiny here" in capsys.readouterr().err
