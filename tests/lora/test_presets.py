"""Presets say what they are; combinations that nobody can train are refused by name; patterns name what they should."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from itertools import product
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.combinations import faults, idle, used_fields
from lora.config import BankConfig, Combine, Kind, Preset, Scope, Share, Site
from lora.errors import AdapterError
from lora.methods import METHODS
from lora.presets import PRESETS, bank_at, check_banks, expand, expansion, matches

FIELDS = [f.name for f in fields(BankConfig)]


@pytest.mark.parametrize("name", PRESETS)
def test_a_docstring_has_the_formula_the_paper_the_defaults_and_what_is_open(name):
    text = inspect.getdoc(METHODS[name])
    first, *_ = text.splitlines()
    assert re.search(r"arXiv \d{4}\.\d{5}|no paper", first), first
    assert re.search(r"^\w+ = ", text, re.MULTILINE)
    defaults, _, unverified = text.partition("Defaults: ")[2].partition("Not verified: ")
    assert unverified.strip()
    values = METHODS[name]()
    rest = re.search(r"the rest as ([a-z-]+)", defaults)
    if rest:
        values = {key: value for key, value in values.items() if METHODS[rest[1]]().get(key) != value}
    words = " ".join(defaults.split())
    for key, value in values.items():
        shown = " and ".join(", ".join(value).rsplit(", ", 1)) if isinstance(value, tuple) else value
        shown = str(shown).lower() if isinstance(value, bool) else str(shown).removesuffix(".0")
        assert re.search(rf"\b{key} {re.escape(shown)}\b", words), (key, shown, words)


NEEDED = {
    "moelora-task": {"num_tasks": 3},
    "arrow": {"adapters": ("a", "b", "c")},
    "mole": {"adapters": ("a", "b")},
    "x-lora": {"adapters": ("a", "b")},
}


def test_every_preset_is_a_method_that_can_be_trained():
    assert tuple(PRESETS) == get_args(Preset)
    for name in PRESETS:
        full = expand(BankConfig(name, **NEEDED.get(name, {})))
        assert not list(faults(full)), name
        assert all(getattr(full, field) is not None for field in FIELDS)
        inherited = {"top_k"} if name in ("mixlora-dynamic", "mixlora-switch") else set()
        assert set(PRESETS[name]) - inherited <= set(used_fields(full)), f"{name} sets what has no effect"
        check_banks({"b": full})


def test_an_expansion_says_every_field_in_use_and_no_other():
    bank = BankConfig("mola", r=4, num_experts=(2, 4))
    text = expansion(bank)
    assert text.startswith("mola: ")
    assert "num_experts [2, 4]" in text
    assert "renormalise true" in text
    assert "targets [q_proj, v_proj]" in text
    assert "top_p" not in text
    assert [part.split(" ")[0] for part in re.split(r", (?=[a-z])", text.partition(": ")[2]) if " " in part][:2] == [
        "targets",
        "site",
    ]


PUBLISHED = {
    (full.site, full.kind, full.router, full.combine, full.share)
    for full in (expand(BankConfig(name)) for name in PRESETS)
}


def test_every_combination_is_either_trained_or_refused_by_a_field_that_is_part_of_it():
    parts = ("site", "kind", "router", "combine", "share")
    seen = set()
    for values in product(*map(get_args, (Site, Kind, Scope, Combine, Share))):
        full = expand(BankConfig("lora", **dict(zip(parts, values, strict=True)), num_experts=4, num_tasks=2))
        if full.site == "experts":
            full = expand(BankConfig("expert-lora", **dict(zip(parts, values, strict=True)), num_tasks=2))
        found = list(faults(full))
        if not found:
            seen.add(values)
        for field, sentence in found:
            assert field in parts
            assert sentence.startswith(f"{field}={getattr(full, field)}")
            assert "; write " in sentence
    assert seen >= PUBLISHED
    assert ("experts", "lowrank", "token", "top_k", "none") not in seen
    assert ("linear", "lowrank", "base", "top_k", "none") not in seen


@pytest.mark.parametrize(
    ("bank", "part"),
    [
        (BankConfig("lora", mixer=True, kind="scale"), "mixer=true"),
        (BankConfig("mixlora", mixer=True), "mixer=true is for banks of their own, not for site: ffn here; write"),
        (BankConfig("mola", num_experts=(2, 1)), "top_k=2 is more than num_experts=[2, 1]"),
        (BankConfig("moelora-task"), "num_tasks=1"),
        (BankConfig("moelora-task", num_tasks=2, r=6), "r=6 cannot be divided among num_experts=8"),
        (BankConfig("expert-lora", targets=("q_proj",)), "experts have no tensor 'q_proj'"),
        (BankConfig("molora", top_k=1), "top_k has no effect"),
        (BankConfig("mola", top_k=1), "renormalise=true makes the only weight of top_k=1 always 1"),
        (BankConfig("molora", num_experts=1), "num_experts=1 leaves router: token nothing to choose"),
        (BankConfig("hydralora", num_experts=(1, 3)), "num_experts=[1, 3] leaves router: token nothing to choose"),
        (BankConfig("perft-e", balance="switch"), "balance=switch"),
        (BankConfig("mola", balance="localized_cv2"), "balance=localized_cv2"),
        (BankConfig("adamole", combine="soft"), "balance=switch counts choices, and combine: soft makes none"),
        (BankConfig("mixlora", num_experts=(4, 8)), "balance_pooled=true, but layers with num_experts=[4, 8]"),
        (BankConfig("arrow"), "adapters is empty"),
        (BankConfig("arrow", adapters=("a", "b")), "top_k=3 is more than num_experts=2"),
        (BankConfig("arrow", adapters=("a", "b", "b")), "adapters names 'b' twice"),
        (BankConfig("arrow", adapters=("a",), top_k=1), "adapters has 'a' alone"),
        (BankConfig("arrow", adapters=("a", "b", "c"), num_experts=4), "num_experts=4, and adapters names 3"),
        (BankConfig("arrow", adapters=("a", "b", "c"), alpha=4.0), "alpha has no effect"),
        (BankConfig("arrow", adapters=("a", "b", "c"), combine="switch"), "combine=switch is for score: linear"),
        (BankConfig("arrow", adapters=("a", "b", "c"), z_loss_coef=0.1), "z_loss_coef=0.1 is for training"),
        (BankConfig("arrow", adapters=("a", "b", "c"), r=(8, 4)), "r=[8, 4]: adapters of all layers"),
        (BankConfig("hydralora", router_aux_loss_coef=0.1), "router_aux_loss_coef has no effect"),
        (BankConfig("mole"), "adapters is empty, and score: outputs is of trained adapters"),
        (BankConfig("mole", adapters=("a", "b"), combine="top_k"), "balance=product is a loss on soft weights"),
        (BankConfig("mole", adapters=("a", "b"), router="task", balance="none"), "router=task asks no token"),
        (BankConfig("mole", adapters=("a", "b"), jitter=0.1), "jitter=0.1 is for score: linear"),
        (BankConfig("moelora", adapters=("a", "b")), "contrastive_coef=0.01 is for factors that train"),
        (BankConfig("hydralora", adapters=("a", "b")), "share=A is for factors that train"),
        (BankConfig("mixlora", adapters=("a", "b")), "adapters are for site: linear, not ffn"),
        (BankConfig("lora", adapters=("a", "b")), "router=none weighs no adapters"),
        (BankConfig("mola", adapters=("a", "b"), top_k=1), "renormalise=true makes the only weight of top_k=1"),
        (
            BankConfig("x-lora"),
            "adapters is empty, and score: states is of trained adapters; list two or more",
        ),
        (BankConfig("x-lora", num_experts=3, combine="switch"), "combine=switch is for score: linear"),
        (BankConfig("x-lora", num_experts=3, jitter=0.1), "jitter=0.1 is for score: linear"),
        (BankConfig("x-lora", ("mlp",), "parallel", num_experts=3), "score=states is for linear layers, not for site:"),
        (BankConfig("x-lora", adapters=("a", "b"), mixer=True), "mixer=true is for factors that train"),
        (BankConfig("x-lora", adapters=("a", "b"), num_experts=3), "num_experts=3, and adapters names 2"),
        (BankConfig("mola", temperature=2.0), "temperature has no effect"),
        (BankConfig("lora", dropout=1.0), "dropout must be at least 0 and less than 1, not 1.0"),
        (BankConfig("lora", num_experts=4), "num_experts has no effect here: it belongs to a bank with a router"),
        (BankConfig("lora", combine="soft"), "combine=soft with router: none"),
        (BankConfig("mola", combine="sum"), "combine=sum with router: token"),
        (BankConfig("mola", router="base"), "router=base with site: linear"),
        (BankConfig("mola", num_experts=2, top_k=3), "top_k=3 is more than num_experts=2"),
        (BankConfig("molora", contrastive_coef=0.1), "contrastive_coef has no effect"),
        (BankConfig("mov", mixer=True), "mixer=true stands between low-rank factors"),
        (BankConfig("mola", share="outer"), "share=outer is not for site: linear"),
    ],
)
def test_a_bank_that_cannot_be_is_named_with_its_key(bank, part):
    with pytest.raises(AdapterError, match=re.escape(part)) as caught:
        check_banks({"one": bank})
    assert str(caught.value).startswith("adapter.one.")


def test_only_given_fields_are_idle():
    full = expand(BankConfig("hydralora"))
    assert not list(idle(full, [name for name in FIELDS if name in used_fields(full)]))
    assert [name for name, _ in idle(full, ["r", "top_p", "capacity"])] == ["top_p", "capacity"]


@given(groups=st.integers(1, 6), each=st.integers(1, 5), data=st.data())
def test_lists_give_groups_of_neighbouring_layers_their_own_numbers(groups, each, data):
    ranks = tuple(data.draw(st.lists(st.integers(1, 9), min_size=groups, max_size=groups)))
    layers = groups * each
    found = [bank_at(BankConfig("lora", r=ranks), layer, layers).r for layer in range(layers)]
    assert found == [r for r in ranks for _ in range(each)]
    if groups > 1:
        with pytest.raises(AdapterError, match=rf"r has {groups} entries, .* {layers + 1} layers"):
            bank_at(BankConfig("lora", r=ranks), 0, layers + 1)


def test_rank_rules():
    assert bank_at(BankConfig("mola", r=8, rank_rule="per_total"), 0, 1).r == 2
    assert bank_at(BankConfig("mola", r=8, rank_rule="per_active"), 0, 1).r == 4
    assert bank_at(BankConfig("molora", r=20, rank_rule="per_active"), 0, 1).r == 2
    here = bank_at(BankConfig("expert-lora", r=16, rank_rule="per_active", alpha=8.0), 0, 1, routed=64, active=8)
    assert (here.r, here.num_experts, here.scale) == (2, 64, 4.0)
    with pytest.raises(AdapterError, match="needs the model's experts per token"):
        bank_at(BankConfig("expert-lora", r=16, rank_rule="per_active"), 0, 1, routed=64)
    with pytest.raises(AdapterError, match=r"r=8 cannot be divided among 3 experts .rank_rule: per_total.; choose"):
        bank_at(BankConfig("mola", r=8, num_experts=(4, 3), rank_rule="per_total"), 1, 2)
    assert bank_at(BankConfig("rslora", r=4, alpha=6.0), 0, 1).scale == 3.0


PARTS = st.lists(st.sampled_from(["model", "layers", "0", "1", "mlp", "q_proj"]), min_size=1, max_size=6)


@given(path=PARTS, keep=st.integers(1, 6))
def test_a_pattern_without_wildcards_names_exactly_the_paths_that_end_in_it(path, keep):
    name, ending = ".".join(path), ".".join(path[-keep:])
    assert matches(ending, name)
    assert not matches(f"x{ending}", name)
    assert matches("*", name)
