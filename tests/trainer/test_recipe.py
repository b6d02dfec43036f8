"""Recipes are read strictly: every mistake is named with its place, and good recipes round-trip."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer import yaml_lines
from trainer.recipe import (
    RecipeError,
    check_world,
    load_recipe,
    recipe_fingerprint,
    recipe_to_yaml,
    recipe_warnings,
)
from trainer.schema import KEYS

# Each line stands for ten of the one before: 10^9 values in a few hundred bytes.
BOMB = b"a0: &a0 [x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 10)
)
ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("**/*.yaml"))
BROKEN = sorted((ROOT / "tests" / "broken_recipes").glob("*.yaml"))

VALID = """\
model:
  family: qwen3_moe
  hidden_size: 64
  num_hidden_layers: 2
  num_attention_heads: 4
  num_key_value_heads: 2
  moe_intermediate_size: 32
  num_experts: 8
  num_experts_per_tok: 2
data:
  source: stdlib
  include: ["json/*.py"]
  tokenizer: {kind: bpe, vocab_size: 512}
  sequence_length: 32
parallel: {workers: 2, ep: 2}
train:
  steps: 20
  global_batch_size: 8
  micro_batch_size: 4
  lr: 2e-4
adapter:
  experts: {preset: expert-lora}
  attention: {preset: mola, r: 4}
"""


@pytest.fixture
def valid(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(VALID)
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as error:
        load_recipe(path, overrides)
    assert str(error.value) == "\n".join(error.value.problems)
    return error.value.problems


@pytest.mark.parametrize("path", BROKEN, ids=lambda path: path.stem)
def test_broken_recipe_is_refused_with_exactly_these_problems(path: Path) -> None:
    """The golden lines ``#! LINE: MESSAGE`` at the top of each file."""
    golden = re.findall(r"^#! (\d+): (.*)$", path.read_text(), re.MULTILINE)
    assert golden
    assert problems(path) == [f"{path}:{line}: {text.replace('{file}', str(path))}" for line, text in golden]
    for _, text in golden:
        assert re.search(r"; |: ", text), f"says what is wrong but not what to do: {text}"


def test_number_of_broken_recipes() -> None:
    assert len(BROKEN) == 79


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_is_valid_and_says_how_to_start_it(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.log.run == path.stem
    assert recipe_warnings(recipe) == []
    assert f"planaria train recipes/{path.relative_to(ROOT / 'recipes')}" in path.read_text()


def test_number_of_shipped_recipes() -> None:
    assert [path.name for path in RECIPES] == [
        "chat-lora.yaml",
        "concurrent-adapters.yaml",
        "merged-experts.yaml",
        "mixlora.yaml",
        "multi-token.yaml",
        "quickstart-lora.yaml",
        "quickstart.yaml",
    ]


def test_values_types_and_resolved_defaults(valid: Path) -> None:
    recipe = load_recipe(valid)
    assert recipe.train.lr == 2e-4
    assert isinstance(recipe.train.lr, float)
    assert recipe.model.head_dim == 16
    assert recipe.data.include == ("json/*.py",)
    assert recipe.log.run == "tiny"
    assert recipe.checkpoint.memory.every == 1
    assert recipe.checkpoint.disk.every == 0
    assert recipe.checkpoint.memory.budget_gib == "auto"
    assert recipe.checkpoint.wal.rotation == "auto"
    assert recipe.checkpoint.pec.k_snapshot == "auto"
    assert recipe.adapter["experts"].targets == ("gate_up_proj", "down_proj")
    assert recipe.adapter["attention"].targets == ("q_proj", "v_proj")
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.train.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4), ("1E3", 1e3), ("-.5", -0.5), ("3", 3), ("0x10", 16), ("0o17", 15), ("017", 17),
        ("true", True), ("yes", "yes"), ("on", "on"), ("1:30", "1:30"), ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"), ("~", None), ("null", None), ("'2e-4'", "2e-4"), ("1.2.3", "1.2.3"), ("e5", "e5"),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    document = yaml_lines.read(f"key: {text}", lambda line: yaml_lines.Place(line, f"f:{line}"))
    assert not document.problems
    assert document.values == {"key": value}
    assert type(document.values["key"]) is type(value)


def test_overrides(valid: Path) -> None:
    recipe = load_recipe(
        valid,
        [
            "train.lr=1e-2",
            "checkpoint.disk.every=5",
            "data.include=[re/*.py, json/*.py]",
            "adapter={}",
            "train.lr=2e-2",
        ],
    )
    assert recipe.train.lr == 2e-2, "the last one counts"
    assert recipe.checkpoint.disk.every == 5
    assert recipe.data.include == ("re/*.py", "json/*.py")
    assert recipe.adapter == {}


def test_an_override_mends_the_file_and_hides_its_line(valid: Path) -> None:
    valid.write_text(VALID.replace("steps: 20", "steps: twenty"))
    assert problems(valid)[0].startswith(f"{valid}:17: train.steps")
    assert load_recipe(valid, ["train.steps=5"]).train.steps == 5


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.lr=abc", "train.lr must be a number, not the text 'abc'"),
        ("train.lr", "not an override; write section.key=value"),
        ("=3", "not an override"),
        ("train..lr=3", "not an override"),
        ("train.lr=", "train.lr must be a number, not empty"),
        ("train.lr=[1", "not valid YAML"),
        ("train.learning_rate=1", "unknown key train.learning_rate; did you mean train.lr?"),
        ("train.lr.x=1", "train.lr is the number 0.0002, it has no key 'x'; set train.lr itself"),
        ("lr=1", "unknown key lr; did you mean train.lr? (that key lives under 'train')"),
        ("parallel.ep=3", "parallel.ep=3 does not divide parallel.workers=2"),
        ("parallel={workers: 3}", "train.global_batch_size=8 is not a multiple"),
        ("adapter.experts.r=0", "adapter.experts.r must be at least 1"),
        ("adapter.my bank={preset: mola}", "adapter bank 'my bank'"),
        ("log.run=../elsewhere", "names a folder"),
        ("data.heldout_fraction=0.9", "must be at most 0.5"),
        ("data.include=[]", "data.include is empty"),
    ],
)
def test_bad_override_is_named(valid: Path, override: str, part: str) -> None:
    found = problems(valid, override)
    named = [line for line in found if line.startswith(f"argument {override!r}: ")]
    if override.startswith("parallel={"):
        assert found == [line for line in found if line.startswith(f"{valid}:18: ") and part in line]
    else:
        assert any(part in line for line in named), found


def test_file_and_arguments_are_reported_together(valid: Path) -> None:
    valid.write_text(VALID.replace("hidden_size", "hiden_size"))
    assert [line.split(": ")[0] for line in problems(valid, "train.lr=x", "train.stepz=3")] == [
        f"{valid}:3",
        "argument 'train.lr=x'",
        "argument 'train.stepz=3'",
    ]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", ":1: the recipe is empty"),
        (b"# only a comment\n", ":1: the recipe is empty"),
        (b"- a\n- b\n", ":1: the top level is a list; a recipe is a mapping"),
        (b"just text\n", ":1: the top level is the text 'just text'"),
        (b"model:\n  family: caf\xe9\n", ":2: byte 0xe9 is not UTF-8"),
        (b"model:\n  family: a\x07b\n", ":2: character '\\x07' is not allowed"),
        (b"a: &x\n  b: *x\n", ":1: nested too deeply"),
        (b"[" * 5000, ":1: nested too deeply"),
        (BOMB, ":1: the aliases (*name) of this document stand for more than 10,000 values; write them out"),
        (b"a: &x [*x, *x, *x]\n", ":1: the aliases (*name) of this document stand for more than 10,000 values"),
    ],
    ids=["empty", "comment", "list", "text", "latin1", "control", "cycle", "depth", "bomb", "cycles"],
)
def test_unreadable_files(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(raw)
    assert any(line.startswith(f"{path}{message}") for line in problems(path)), problems(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert problems(tmp_path / "none.yaml") == [f"{tmp_path / 'none.yaml'}: no such file; give the path of a recipe"]
    assert "a folder" in problems(tmp_path)[0]


def test_file_patterns_are_relative_to_the_recipe(tmp_path: Path, valid: Path) -> None:
    valid.write_text(
        VALID.replace("source: stdlib", "source: files").replace('"json/*.py"', '"text/*.txt", "/a/b.txt"')
    )
    recipe = load_recipe(valid)
    assert recipe.data.include == (str(tmp_path.resolve() / "text/*.txt"), "/a/b.txt")


@pytest.mark.parametrize("path", [*RECIPES, None], ids=lambda path: path.stem if path else "tiny")
def test_round_trip(path: Path | None, valid: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path or valid)
    copy_path = tmp_path / "copy.yaml"
    copy_path.write_text(recipe_to_yaml(recipe))
    assert load_recipe(copy_path) == recipe
    assert recipe_fingerprint(load_recipe(copy_path)) == recipe_fingerprint(recipe)


@given(run=st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,8}", fullmatch=True), lr=st.floats(1e-12, 1e6))
@example(run="2e-4", lr=1e-8)
@example(run="yes", lr=1e22)
@example(run="1_000", lr=0.1)
@settings(max_examples=60, deadline=None)
def test_round_trip_of_awkward_scalars(tmp_path_factory: pytest.TempPathFactory, run: str, lr: float) -> None:
    """Names such as 2e-4, 1.5, null or yes stay names in the resolved recipe."""
    path = tmp_path_factory.mktemp("round") / "r.yaml"
    values = yaml.safe_load(VALID)
    values["log"] = {"run": run}
    values["train"]["lr"] = lr
    path.write_text(yaml_lines.dump(values))
    recipe = load_recipe(path)
    assert (recipe.log.run, recipe.train.lr) == (run, lr)
    theirs = yaml.safe_load(recipe_to_yaml(recipe))
    assert (theirs["log"]["run"], theirs["train"]["lr"]) == (run, lr), "YAML 1.1 readers agree"
    path.write_text(recipe_to_yaml(recipe))
    assert load_recipe(path) == recipe


_LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-3, 9), st.floats(), st.text(max_size=5))
_JUNK = st.recursive(_LEAVES, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner))


@given(
    path=st.sampled_from([path for path in KEYS if "*" not in path] + [("adapter", "experts", "r"), ("adapter", "x")]),
    junk=_JUNK,
)
@settings(max_examples=300, deadline=None)
def test_any_value_anywhere_is_accepted_or_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, path: tuple[str, ...], junk: object
) -> None:
    values = copy.deepcopy(yaml.safe_load(VALID))
    node = values
    for name in path[:-1]:
        node = node.setdefault(name, {})
    node[path[-1]] = junk
    file = tmp_path_factory.mktemp("junk") / "r.yaml"
    file.write_text(yaml_lines.dump(values), encoding="utf-8", errors="replace")
    try:
        recipe = load_recipe(file)
    except RecipeError as error:
        refused = error.problems
    else:
        file.write_text(recipe_to_yaml(recipe))
        assert load_recipe(file) == recipe
        return
    assert refused
    assert all(re.match(rf"{re.escape(str(file))}:\d+: .", problem) for problem in refused), refused


def test_fingerprint_changes_with_what_changes_the_bits(valid: Path) -> None:
    base = recipe_fingerprint(load_recipe(valid))
    assert re.fullmatch("[0-9a-f]{16}", base)
    kept = ("log.run=other", "log.dir=x", "parallel.restarts=9", "data.cache_dir=/x", "checkpoint.disk.every=7")
    for same in (*kept, "train.eval_every=3"):
        assert recipe_fingerprint(load_recipe(valid, [same])) == base, same
    for other in ("train.seed=1", "train.lr=3e-4", "parallel.ep=1", "adapter.experts.r=4", "model.rope_theta=1e5"):
        assert recipe_fingerprint(load_recipe(valid, [other])) != base, other


@pytest.mark.parametrize(
    ("overrides", "sections"),
    [
        (["checkpoint.mode=dense"], set()),
        (["checkpoint.mode=wal", "checkpoint.wal.rotation=6"], {"wal"}),
        (["checkpoint.mode=pec", "checkpoint.pec.k_snapshot=4"], {"pec", "wal"}),
        (["checkpoint.mode=pec", "checkpoint.pec={k_snapshot: 8, k_persist: 2, fallback: dense}"], {"pec"}),
        (["checkpoint.mode=pec", "adapter={}", "checkpoint.memory.budget_gib=1.5"], {"pec", "wal"}),
    ],
)
def test_modes_keep_their_own_keys(valid: Path, tmp_path: Path, overrides: list[str], sections: set[str]) -> None:
    recipe = load_recipe(valid, overrides)
    written = yaml.safe_load(recipe_to_yaml(recipe))["checkpoint"]
    assert written.keys() & {"wal", "pec"} == sections
    (tmp_path / "copy.yaml").write_text(recipe_to_yaml(recipe))
    assert load_recipe(tmp_path / "copy.yaml") == recipe


def test_warns_when_nothing_would_survive(valid: Path) -> None:
    assert recipe_warnings(load_recipe(valid)) == []
    off = load_recipe(valid, ["checkpoint.memory.enabled=false"])
    assert "from step 0" in recipe_warnings(off)[0]
    assert recipe_warnings(load_recipe(valid, ["checkpoint.memory.enabled=false", "checkpoint.disk.every=5"])) == []


def test_warns_of_partial_checkpoints_that_load_workers_unequally(valid: Path) -> None:
    pec = ["checkpoint.mode=pec", "adapter={}"]
    assert recipe_warnings(load_recipe(valid, [*pec, "checkpoint.pec.k_snapshot=1"])) == []
    odd = load_recipe(valid, [*pec, "checkpoint.pec.k_snapshot=1", "model.num_hidden_layers=3"])
    assert "k_snapshot=1 x 3 layers is no multiple of parallel.ep=2" in recipe_warnings(odd)[0]


def test_world_must_be_the_recipes(valid: Path) -> None:
    recipe = load_recipe(valid)
    check_world(recipe, 2)
    with pytest.raises(RecipeError, match=r"WORLD_SIZE=4 .*parallel\.workers=2"):
        check_world(recipe, 4)


def test_path_recipes_need_no_shape(valid: Path, tmp_path: Path) -> None:
    rest = VALID[VALID.index("data:") :].replace("{kind: bpe, vocab_size: 512}", "{kind: model}")
    valid.write_text("model: {path: some/folder}\n" + rest)
    recipe = load_recipe(valid)
    assert recipe.model.path == "some/folder"
    assert recipe.model.family is None
    assert recipe.data.tokenizer.vocab_size == 0
