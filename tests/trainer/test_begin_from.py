"""Which checkpoint a run may begin with, and what is said when it may not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from checkpointing.materialise import sections_of
from checkpointing.state.buffers import StateBuffer, StateSpan
from checkpointing.store import Checkpoint, write_checkpoint
from checkpointing.units import Range
from lora.config import BankConfig
from tests.moe.tiny_families import tiny
from trainer import begin_from
from trainer.begin_from import LoadError, carried_progress, choose, data_order, incompatible, layout_of
from trainer.computed import changes, computed
from trainer.export import open_run
from trainer.origin import Origin
from trainer.progress import Progress
from trainer.recipe import load_recipe, recipe_fingerprint, recipe_to_yaml
from trainer.schema import ModelSection, Recipe

ALONE = SimpleNamespace(rank=0, world=1, coordinate="dp0000")
TENSORS: dict[str, Any] = {"w": {"param": "w", "shape": [6], "expert": None, "elements": 6, "dtype": "float32"}}
ORIGIN = Origin("r", "text", "", 2, 2, 1, "cpu", "float32", "AdamW(fused=True)", "2")


def recipe(*overrides: str) -> Recipe:
    return load_recipe("recipes/quickstart.yaml", overrides)


def written(folder: Path, step: int = 4, origin: Origin = ORIGIN, counts: tuple[float, ...] = (4.0, 4.0)) -> Checkpoint:
    sections = {}
    for rank, count in enumerate(counts):
        span = StateSpan(Range("w", "master", 3 * rank, 3 * rank + 3), 0)
        buffer = StateBuffer("group0.master", torch.arange(3.0), (span,))
        progress = Progress(step, 8 * step, f"chain{rank}", [count, count])
        sections[f"dp{rank:04d}"] = sections_of([buffer], {"progress": progress.dump()})
    metadata = vars(origin) | data_order(recipe())
    return Checkpoint.open(write_checkpoint(folder, step, sections, TENSORS, metadata))


def damage(checkpoint: Checkpoint) -> None:
    file = checkpoint.file_of("dp0001")
    blob = bytearray(file.read_bytes())
    blob[-3] ^= 1
    file.write_bytes(blob)


def test_the_newest_that_verifies_is_taken_of_a_run(tmp_path: Path) -> None:
    place = tmp_path / "checkpoints"
    written(place, 4)
    damage(written(place, 6))
    assert choose(str(tmp_path)).step == choose(str(place)).step == 4
    assert choose(str(place / "step-4")).step == 4
    with pytest.raises(LoadError, match=r"step-6/dp0001.*bring it back"):
        choose(str(place / "step-6"))
    with pytest.raises(LoadError, match="neither a run folder"):
        choose(str(tmp_path / "nowhere"))
    damage(Checkpoint.open(place / "step-4"))
    with pytest.raises(LoadError, match="no usable checkpoint"):
        choose(str(tmp_path))


def test_a_newer_step_that_is_passed_over_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(recipe()))
    written(tmp_path / "checkpoints", 4)
    damage(written(tmp_path / "checkpoints", 6))
    torn = written(tmp_path / "checkpoints", 8)
    (torn.path / "manifest.json").unlink()
    for opened in (lambda: choose(str(tmp_path)), lambda: open_run(tmp_path)[1]):
        assert opened().step == 4
        newest, newer = capsys.readouterr().err.splitlines()
        assert newest.startswith("step 8 is passed over: ")
        assert "manifest.json" in newest
        assert newer.startswith("step 6 is passed over: ")
        assert "dp0001.safetensors: its bytes do not match" in newer


def test_a_later_attempt_begins_with_the_same_or_not_at_all(tmp_path: Path) -> None:
    place = tmp_path / "checkpoints"
    written(place, 4)
    written(place, 6)
    assert choose(str(tmp_path), str(place / "step-4")).step == 4
    with pytest.raises(LoadError, match=r"an earlier attempt of this run began with it.*log\.run=NAME"):
        choose(str(tmp_path), str(place / "step-2"))


@pytest.mark.parametrize(
    ("origin", "overrides", "words"),
    [
        (replace(ORIGIN, dtype="bfloat16"), (), "dtype: 'float32' in the checkpoint, 'bfloat16' here"),
        (replace(ORIGIN, optimizer="Lion(fused=False)"), (), "moments of one are none of another"),
        (replace(ORIGIN, base="other"), (), "frozen base model"),
        (replace(ORIGIN, data="other"), (), "text: 'text' in the checkpoint"),
        (ORIGIN, ("train.seed=9",), "it orders the samples"),
        (ORIGIN, ("train.global_batch_size=16",), "samples are counted in it"),
        (ORIGIN, ("train.steps=4", "train.warmup_steps=0"), "raise train.steps=4 above that"),
    ],
)
def test_what_differs_is_named(tmp_path: Path, origin: Origin, overrides: tuple[str, ...], words: str) -> None:
    (problem,) = incompatible(written(tmp_path), recipe(*overrides), origin, TENSORS)
    assert words in problem


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.rope_theta=500000.0"], ["rope_parameters.rope_theta: 10000.0 in the checkpoint, 500000.0 here"]),
        (["model.num_experts_per_tok=2"], ["num_experts_per_tok: 4 in the checkpoint, 2 here"]),
        (["model.norm_topk_prob=false"], ["norm_topk_prob: True in the checkpoint, False here"]),
        (
            ["routing={method: top_k, top_k: 2, n_group: 4, topk_group: 2, routed_scaling_factor: 2.5}"],
            [
                "routing.method: 'model' in",
                "routing.n_group: None in",
                "routing.routed_scaling_factor: None in the checkpoint, 2.5 here",
                "routing.top_k: None in the checkpoint, 2 here",
                "routing.topk_group: None in",
            ],
        ),
        (["train.lr=1e-2", "model.router_aux_loss_coef=0", "parallel.ep=1"], []),
    ],
)
def test_what_the_same_weights_compute_otherwise_is_said(
    tmp_path: Path, overrides: list[str], says: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """And trained: a run may go on with another number of experts, but not in silence."""
    checkpoint, rows = written(tmp_path), []
    events = SimpleNamespace(write=lambda kind, **row: rows.append(row))
    ours = recipe(*overrides, f"checkpoint.load_from={checkpoint.path}")
    run = SimpleNamespace(run_dir=tmp_path, process=ALONE, recipe=ours, origin=ORIGIN, events=events)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(begin_from.dist, "broadcast_object_list", lambda *args, **more: None)
        with begin_from._opened(run, TENSORS) as opened:
            assert opened.path == checkpoint.path
    lines = capsys.readouterr().err.splitlines()
    assert [row["changed"] for row in rows] == [[line.partition("else: ")[2] for line in lines]]
    assert len(lines) == len(says)
    for line, words in zip(lines, says, strict=True):
        assert f"compute something else: {words}" in line


def test_adapters_and_the_folders_configuration_are_compared(tmp_path: Path) -> None:
    models = {"a": tiny("deepseek_v3"), "b": tiny("deepseek_v3", routed_scaling_factor=1.0, n_group=2)}
    found = {}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        section = ModelSection(path=str(tmp_path / name))
        bank = BankConfig(preset="expert-lora", alpha=4.0 if name == "a" else 8.0)
        found[name] = computed(replace(recipe(), model=section, adapter={"x": bank}))
    assert changes(found["a"], found["b"]) == [
        "adapter.x.alpha: 4.0 in the checkpoint, 8.0 here",
        "n_group: 4 in the checkpoint, 2 here",
        "routed_scaling_factor: 2.5 in the checkpoint, 1.0 here",
    ]
    assert changes({}, found["b"]) == []


def test_another_layout_device_and_implementation_fit(tmp_path: Path) -> None:
    other = replace(ORIGIN, world=4, zero=2, device="cuda", torch="9", recipe="s", optimizer="AdamW(fused=False)")
    checkpoint = written(tmp_path)
    assert incompatible(checkpoint, recipe("train.lr=1e-2"), other, TENSORS) == []
    assert str(layout_of(checkpoint)) == "2 workers, ep 2, ZeRO-1"


def test_another_model_is_shown_tensor_by_tensor(tmp_path: Path) -> None:
    wider = {"w": TENSORS["w"] | {"shape": [7], "elements": 7}, "v": TENSORS["w"]}
    problems = incompatible(written(tmp_path), recipe(), ORIGIN, wider)
    assert problems[0] == "  v: not in the checkpoint"
    assert "[6]" in problems[1]
    assert "[7]" in problems[1]


def test_samples_that_do_not_fit_the_batch_are_refused_when_nothing_else_is_known(tmp_path: Path) -> None:
    checkpoint = written(tmp_path)
    for key in data_order(recipe()):
        del checkpoint.manifest["metadata"][key]
    (problem,) = incompatible(checkpoint, recipe("train.global_batch_size=16"), ORIGIN, TENSORS)
    assert "32 samples in 4 steps" in problem


def test_progress_carries_over_whole_or_of_one_worker(tmp_path: Path) -> None:
    checkpoint = written(tmp_path / "a")
    assert carried_progress(checkpoint, "dp0001").consumed == "chain1"
    shared = carried_progress(checkpoint, None)
    assert (shared.step, shared.samples, shared.optimizer_steps) == (4, 32, [4.0])
    assert shared.consumed not in ("chain0", "chain1", "")
    with pytest.raises(LoadError, match=r"optimizer steps \[3\.0, 4\.0\]"):
        carried_progress(written(tmp_path / "b", counts=(4.0, 3.0)), None)


def test_load_from_decides_bits_and_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("recipes/quickstart.yaml").resolve()
    plain = load_recipe(path)
    monkeypatch.chdir(tmp_path)
    there = load_recipe(path, ["checkpoint.load_from=there"])
    assert there.checkpoint.load_from == str(tmp_path / "there")
    assert recipe_fingerprint(there) != recipe_fingerprint(plain)
    (tmp_path / "again.yaml").write_text(recipe_to_yaml(there))
    assert load_recipe(tmp_path / "again.yaml", ["log.run=quickstart"]) == there
