"""Recipes that name trained adapters: which ones they are is part of what the run is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora.errors import AdapterError
from trainer.adapter_seal import adapter_problem, adapter_seal
from trainer.recipe import RecipeError, load_recipe, recipe_fingerprint, recipe_to_yaml

RECIPE = """\
model: {path: base}
data: {source: stdlib, include: ["json/*.py"], tokenizer: {kind: model}, sequence_length: 32}
parallel: {workers: 1, ep: 1}
train: {steps: 4, global_batch_size: 4, micro_batch_size: 4, lr: 1e-2}
adapter:
  gates: {preset: mole, adapters: [one, two]}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two", "three"):
        seal(tmp_path / name, name)
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path / "r.yaml"


def seal(folder: Path, value: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({"sha256": value}))


def test_a_run_knows_its_adapters_wherever_it_is_looked_at(recipe, tmp_path, monkeypatch):
    loaded = load_recipe(recipe)
    bank = loaded.adapter["gates"]
    assert bank.adapters == (str(tmp_path / "one"), str(tmp_path / "two"))
    assert bank.num_experts == 2
    copy = tmp_path / "copy.yaml"
    copy.write_text(recipe_to_yaml(loaded))
    monkeypatch.chdir("/")
    assert load_recipe(copy).adapter == loaded.adapter
    assert recipe_fingerprint(load_recipe(copy)) == recipe_fingerprint(loaded)


def test_what_is_in_the_folders_decides_and_not_where_they_are(recipe, tmp_path):
    before = recipe_fingerprint(load_recipe(recipe))
    (tmp_path / "two").rename(tmp_path / "moved")
    assert recipe_fingerprint(load_recipe(recipe, ["adapter.gates.adapters=[one, moved]"])) == before
    assert recipe_fingerprint(load_recipe(recipe, ["adapter.gates.adapters=[moved, one]"])) != before
    assert recipe_fingerprint(load_recipe(recipe, ["adapter.gates.adapters=[one, three]"])) != before
    seal(tmp_path / "moved", "other")
    assert recipe_fingerprint(load_recipe(recipe, ["adapter.gates.adapters=[one, moved]"])) != before


def test_folders_that_hold_no_adapter_are_said_with_their_line(recipe, tmp_path):
    (tmp_path / "two" / "manifest.json").rename(tmp_path / "two" / "adapter_config.json")
    with pytest.raises(RecipeError, match=r"r.yaml:6: adapter.gates.adapters: two is PEFT's; make an adapter of it"):
        load_recipe(recipe)
    (tmp_path / "two" / "adapter_config.json").unlink()
    with pytest.raises(RecipeError, match=r"r.yaml:6: adapter.gates.adapters: two is no adapter"):
        load_recipe(recipe)
    with pytest.raises(AdapterError, match="is no adapter"):
        adapter_seal("two")
    (tmp_path / "one" / "manifest.json").write_text("{}")
    assert adapter_problem("one") == ""
    with pytest.raises(AdapterError, match=r"one/manifest.json is damaged .*; export the adapter again"):
        adapter_seal("one")


def test_arrow_may_stand_beside_what_trains_and_not_alone(recipe):
    arrow = "adapter.gates={preset: arrow, top_k: 1, adapters: [one, two]}"
    with pytest.raises(RecipeError, match=r"adapter.gates: nothing trains"):
        load_recipe(recipe, [arrow])
    beside = load_recipe(recipe, [arrow, "adapter.more={preset: lora, targets: [o_proj]}"])
    assert list(beside.adapter) == ["gates", "more"]
