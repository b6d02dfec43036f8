"""The plan's figures are those of transformers' own modules and of the arithmetic of ZeRO."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lora.config import BankConfig
from moe.build import new_config
from moe.family_table import FAMILIES
from trainer.build import shape_fields
from trainer.family_shapes import family_shapes
from trainer.plan import (
    Plan,
    PlanError,
    bank_parameters,
    count_by_kind,
    folder_shapes,
    kind_of,
    plan_run,
)
from trainer.plan_card import card
from trainer.recipe import load_recipe
from trainer.schema import Recipe

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"
TINY = [
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.head_dim=8",
    "model.num_experts=8",
    "model.moe_intermediate_size=16",
    "data.tokenizer.vocab_size=300",
]


def tiny(*overrides: str) -> Recipe:
    return load_recipe(QUICKSTART, [*TINY, *overrides])


def transformers_model(recipe: Recipe, device: str = "meta") -> PreTrainedModel:
    config = new_config(recipe.model.family, shape_fields(recipe), vocab_size=recipe.data.tokenizer.vocab_size)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("overrides", [[], ["model.tie_word_embeddings=true"], ["model.num_key_value_heads=4"]])
def test_shapes_are_those_of_transformers(overrides: list[str]) -> None:
    recipe = tiny(*overrides)
    model = transformers_model(recipe)
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert family_shapes(recipe.model, 300) == theirs


LATENT = [
    "n_shared_experts=2", "kv_lora_rank=12", "qk_rope_head_dim=8", "qk_nope_head_dim=12", "v_head_dim=10",
    "first_k_dense_replace=1", "intermediate_size=40",
]  # fmt: skip
VARIANTS = [
    ("mixtral", ["head_dim=8", "sliding_window=16"]),
    ("mixtral", ["tie_word_embeddings=true"]),
    ("qwen2_moe", ["head_dim=8", "shared_expert_intermediate_size=20"]),
    ("qwen3_moe", ["head_dim=12"]),
    ("olmoe", []),
    ("deepseek_v2", LATENT),
    ("deepseek_v2", [*LATENT[:5], "q_lora_rank=14"]),
    ("deepseek_v3", [*LATENT, "n_group=4", "topk_group=2"]),
    ("deepseek_v3", [*LATENT[:5], "q_lora_rank=14"]),
    ("gpt_oss", ["head_dim=8"]),
]


def of_family(family: str, keys: list[str]) -> Recipe:
    """The quickstart with another family's model."""
    grouped = [] if "kv_lora_rank=12" in keys else ["num_key_value_heads: 2"]
    shape = [
        f"family: {family}", "hidden_size: 32", "num_hidden_layers: 2", "num_attention_heads: 4", "num_experts: 8",
        "num_experts_per_tok: 2", "moe_intermediate_size: 16", *grouped, *(key.replace("=", ": ") for key in keys),
    ]  # fmt: skip
    return load_recipe(QUICKSTART, [f"model={{{', '.join(shape)}}}", "data.tokenizer.vocab_size=300"])


@pytest.mark.parametrize(("family", "keys"), VARIANTS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_familys_shapes_and_counts_are_those_of_the_built_model(family: str, keys: list[str]) -> None:
    recipe = of_family(family, keys)
    model = transformers_model(recipe)
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert family_shapes(recipe.model, 300) == theirs
    plan = plan_run(recipe)
    assert sum(plan.total.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert "other" not in plan.total
    assert plan.num_layers == 2
    assert plan.share.moe_layers == sum(name.endswith("experts.down_proj") for name in theirs)
    idle = sum(prod(shape) for name, shape in theirs.items() if ".experts." in name) * 6 // 8
    assert plan.active == sum(plan.total.values()) - idle


def test_every_family_is_counted() -> None:
    assert {family for family, _ in VARIANTS} == FAMILIES.keys()


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_a_folder_of_the_family_counts_the_same(family: str, tmp_path: Path) -> None:
    recipe = of_family(family, dict(VARIANTS)[family])
    transformers_model(recipe, "cpu").save_pretrained(tmp_path)
    expected = count_by_kind(family_shapes(recipe.model, 300))
    assert count_by_kind(folder_shapes(tmp_path)) == expected
    from_folder = load_recipe(QUICKSTART, [f"model={{path: {tmp_path}}}", "data.tokenizer={kind: model}"])
    assert plan_run(from_folder).total == expected
    assert plan_run(from_folder).active == plan_run(recipe).active


def test_quickstart_has_the_promised_size() -> None:
    recipe = load_recipe(QUICKSTART)
    plan, model = plan_run(recipe), recipe.model
    assert 5e6 < sum(plan.total.values()) < 20e6
    per_expert = 3 * model.hidden_size * model.moe_intermediate_size
    assert plan.total["experts"] == model.num_hidden_layers * model.num_experts * per_expert
    idle = model.num_hidden_layers * (model.num_experts - model.num_experts_per_tok) * per_expert
    assert plan.active == sum(plan.total.values()) - idle
    assert plan.tokens_per_step == recipe.train.global_batch_size * recipe.data.sequence_length


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.embed_tokens.weight", "embeddings"),
        ("lm_head.weight", "embeddings"),
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("model.layers.0.self_attn.q_norm.weight", "norms"),
        ("model.layers.0.post_attention_layernorm.weight", "norms"),
        ("model.layers.0.mlp.gate.weight", "router"),
        ("model.layers.0.block_sparse_moe.gate.weight", "router"),
        ("model.layers.0.mlp.gate.e_score_correction_bias", "router"),
        ("model.layers.0.mlp.experts.gate_up_proj", "experts"),
        ("model.layers.0.mlp.experts.3.gate_proj.weight", "experts"),
        ("model.layers.0.mlp.shared_expert.gate_proj.weight", "shared experts"),
        ("model.layers.0.mlp.shared_expert_gate.weight", "shared experts"),
        ("model.layers.0.mlp.gate_proj.weight", "dense"),
        ("model.something", "other"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


@pytest.mark.parametrize(("workers", "ep", "zero"), [(1, 1, 1), (2, 1, 2), (2, 2, 1), (4, 2, 2), (4, 4, 1), (8, 4, 1)])
def test_bytes_per_worker_match_a_count_over_partitions(workers: int, ep: int, zero: int) -> None:
    """Against a sum over parameters of what each worker holds, by DeepSpeed's groups."""
    recipe = tiny(
        f"parallel.workers={workers}", f"parallel.ep={ep}", f"parallel.zero={zero}", "train.global_batch_size=32"
    )
    plan = plan_run(recipe)
    weights = gradients = states = 0
    for name, shape in family_shapes(recipe.model, 300).items():
        expert = ".experts." in name
        local = prod(shape) // (ep if expert else 1)
        sharers = workers // ep if expert else workers
        weights += local
        gradients += local if zero == 1 else local / sharers
        states += local / sharers
    assert plan.experts_per_worker == 8 // ep
    assert plan.weight_bytes == 4 * weights
    assert plan.gradient_bytes == pytest.approx(4 * gradients, abs=16)
    assert plan.optimizer_bytes == pytest.approx(12 * states, abs=48)
    assert plan.snapshot_bytes == plan.optimizer_bytes * 4, "three generations, and one for the disk tier"


def test_dtype_and_tiers_change_the_bytes() -> None:
    base, half = plan_run(tiny()), plan_run(tiny("parallel.dtype=bf16"))
    assert half.weight_bytes * 2 == base.weight_bytes
    assert half.optimizer_bytes == base.optimizer_bytes
    assert plan_run(tiny("checkpoint.disk.every=0")).generations == 3


def test_without_a_memory_tier_the_disk_still_writes_from_memory() -> None:
    def plan_and_card(*overrides: str) -> tuple[Plan, str]:
        recipe = tiny("checkpoint.memory.enabled=false", *overrides)
        lines = card(recipe, num_files=1, num_bytes=1).splitlines()
        return plan_run(recipe), next(line for line in lines if line.startswith("memory tier"))

    for overrides in ([], ["checkpoint.disk.every=0"]):
        plan, line = plan_and_card(*overrides)
        assert plan.snapshot_bytes == 2 * plan.optimizer_bytes
        assert "off; 2 generations" in line
    plan, line = plan_and_card("checkpoint.disk.every=0", "checkpoint.disk.final=false")
    assert (plan.generations, plan.snapshot_bytes) == (0, 0)
    assert line.split()[-1] == "off"


def numbers_of(shapes: dict, **banks: BankConfig) -> list[int]:
    return [found.total for found in bank_parameters(banks, shapes, 2).values()]


def test_bank_parameters_against_actual_factors() -> None:
    shapes = family_shapes(tiny().model, 300)
    # Per expert: gate_up A [4,32], B [32,4]; down A [4,16], B [32,4].
    assert numbers_of(shapes, e=BankConfig("expert-lora", r=4)) == [2 * 8 * (4 * 32 + 32 * 4 + 4 * 16 + 32 * 4)]
    assert numbers_of(shapes, e=BankConfig("expert-lora", ("down_proj",), r=4)) == [2 * 8 * (4 * 16 + 32 * 4)]
    # q [32,32], v [16,32]; three experts and a router row each.
    mola = BankConfig("mola", targets=("q_proj", "v_proj"), r=4, num_experts=3)
    assert numbers_of(shapes, a=mola) == [2 * (3 * (4 * 32 + 32 * 4) + 3 * 32 + 3 * (4 * 32 + 16 * 4) + 3 * 32)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    transformers_model(tiny(), "cpu").save_pretrained(path, max_shard_size="100KB")
    return path


def with_path(folder: Path, *overrides: str) -> Recipe:
    lora = QUICKSTART.with_name("quickstart-lora.yaml")
    return load_recipe(lora, [f"model.path={folder}", *overrides])


def test_folder_counts_equal_the_familys(folder: Path) -> None:
    shapes = folder_shapes(folder)
    assert count_by_kind(shapes) == count_by_kind(family_shapes(tiny().model, 300))
    for bank in (BankConfig("expert-lora", r=3), BankConfig("mola", r=2)):
        assert numbers_of(shapes, b=bank) == numbers_of(family_shapes(tiny().model, 300), b=bank)
    plan = plan_run(with_path(folder))
    assert plan.num_layers == 2
    assert plan.experts_per_worker == 4
    assert set(plan.trained) == {"adapter.experts", "adapter.attention"}
    assert plan.gradient_bytes < plan.weight_bytes


def test_card_of_an_adapter_run_names_what_trains(folder: Path) -> None:
    text = card(with_path(folder), num_files=3, num_bytes=5 << 20)
    for part in ("adapter.experts", "adapter.attention", "3 files, 5.0 MiB", "ep 2, ZeRO-1"):
        assert part in text, text


def test_misfits_are_named(folder: Path, tmp_path: Path) -> None:
    def refused(recipe: Recipe) -> str:
        with pytest.raises(PlanError) as error:
            plan_run(recipe)
        return str(error.value)

    assert "config.json" in refused(with_path(tmp_path / "nothing"))
    assert "does not divide the 8 experts" in refused(
        with_path(folder, "parallel.ep=3", "parallel.workers=3", "train.global_batch_size=12")
    )
    assert "2048 positions" in refused(with_path(folder, "data.sequence_length=4096"))
    pec = ("checkpoint.mode=pec", "checkpoint.pec.k_snapshot=9")
    assert "k_snapshot=9 is more than the 8 experts" in refused(with_path(folder, *pec))
    (tmp_path / "config.json").write_text('{"num_experts": 8')
    assert "cannot be read" in refused(with_path(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    assert "names no experts" in refused(with_path(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"num_experts": 8}))
    assert "no model*.safetensors" in refused(with_path(tmp_path))
    for junk in (b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]", b"\x05\0\0\0\0\0\0\0nojsn"):
        (tmp_path / "model.safetensors").write_bytes(junk)
        assert "model.safetensors" in refused(with_path(tmp_path))
