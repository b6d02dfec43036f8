"""Selected experts through the real engine, spread over two workers: selection, weight decay, a kill, an export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpointing.store import Checkpoint, list_checkpoints
from trainer import export
from trainer.cli import main
from trainer.drill import judge
from trainer.faults import KillSpec

pytestmark = [pytest.mark.drill, pytest.mark.slow]

CHOSEN = {0: {0, 3}, 1: {1, 2}}
NAMES = ("down_proj", "gate_up_proj")


@pytest.fixture(scope="module")
def base(undisturbed, folder):
    assert export.main(str(folder / "undisturbed"), str(folder / "esft-base")) == 0
    return folder / "esft-base"


@pytest.fixture(scope="module")
def settings(base, folder):
    chosen = folder / "chosen.json"
    chosen.write_text(json.dumps({"layers": {layer: sorted(experts) for layer, experts in CHOSEN.items()}}))
    return [
        f"model={{path: {base}, attention_dropout: 0.1, trainable_experts: {chosen}}}", "data.tokenizer={kind: model}",
        'data.include=["email/*.py"]', "train.weight_decay=0.5",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(start, settings):
    job = start("esft-run", settings)
    return job, job.finish()


def changed(base, out) -> dict[str, set[int]]:
    models = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (base, out))
    before, after = (dict(model.named_parameters()) for model in models)
    assert before.keys() == after.keys()
    found = {}
    for name, was in before.items():
        if ".experts." in name:
            found[name] = {e for e in range(len(was)) if not torch.equal(was[e], after[name][e])}
        else:
            assert torch.equal(was, after[name]), name
    return found


EXPECTED = {f"model.layers.{layer}.mlp.experts.{name}": experts for layer, experts in CHOSEN.items() for name in NAMES}


def test_only_the_chosen_experts_change_bit_for_bit(trained, base, folder):
    job, rows = trained
    assert export.main(str(job.run_dir), str(folder / "esft-out")) == 0
    assert changed(base, folder / "esft-out") == EXPECTED
    heldout = [row["loss"] for row in rows if row["kind"] == "heldout"]
    assert heldout[-1] < heldout[0]


def test_checkpoints_hold_the_chosen_experts_and_nothing_else(trained):
    _, folder = list_checkpoints(trained[0].run_dir / "checkpoints")[-1]
    tensors = Checkpoint.open(folder).manifest["tensors"]
    units = {f"L0{layer}.E00{e}.{name}" for layer, experts in CHOSEN.items() for e in experts for name in NAMES}
    assert set(tensors) == units


def test_a_kill_costs_no_bit_and_zero_1_gives_the_same_experts(start, settings, trained, base, folder):
    kill = KillSpec(1, 7, "optimizer")
    killed, other = start("esft-killed", settings, kill=str(kill)), start("esft-zero-1", [*settings, "parallel.zero=1"])
    verdict = judge(killed.recipe, kill, trained[1], killed.finish())
    assert verdict.passed, verdict.problems
    other.finish()
    assert export.main(str(other.run_dir), str(folder / "esft-zero-1-out")) == 0
    assert changed(base, folder / "esft-zero-1-out") == EXPECTED


def test_experts_are_selected_by_the_recipes_own_data(settings, folder, capsys):
    out, recipe = folder / "selected.json", str(Path(__file__).with_name("drill.yaml"))
    words = ["esft", "select", recipe, str(out), *settings, f"data.cache_dir={folder / 'cache'}"]
    words += ["--score", "gate", "--p", "0.5", "--tokens", "512"]
    assert main(words) == 0
    found = json.loads(out.read_text())
    assert found["tokens"] == 512
    assert set(found["layers"]) == {"0", "1"}
    assert all(1 <= len(experts) <= 3 for experts in found["layers"].values())
    assert f"model.trainable_experts={out}" in capsys.readouterr().out
    assert main(words) == 2
    assert "exists" in capsys.readouterr().err
