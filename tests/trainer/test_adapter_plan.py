"""What a plan predicts from shapes is what attaching makes: numbers, places and bytes."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora.attach import attach, places_of
from lora.config import BankConfig
from lora.presets import PRESETS, expand
from moe.build import new_model
from moe.context import BatchContext, batch_context
from moe.convert import convert
from trainer.activations import Batch, saved_bytes, working_bytes
from trainer.adapter_plan import plan_adapters, presets_text, table
from trainer.model_shapes import model_shapes
from trainer.plan import PlanError, bank_parameters
from trainer.recipe import load_recipe

MOE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8,
}  # fmt: skip
LATENT = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "n_shared_experts": 1, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1, "intermediate_size": 24,
}  # fmt: skip
FAMILIES = {
    "qwen3_moe": MOE,
    "mixtral": MOE,
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 20},
    "deepseek_v3": LATENT,
    "gpt_oss": MOE,
}


def of_family(family: str):
    return new_model(family, FAMILIES[family], vocab_size=64, seed=0, dtype=torch.float32)


def shapes_of(model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_places_read_off_shapes_are_those_of_the_modules(family):
    model = of_family(family)
    shapes = shapes_of(model)
    theirs, ours = places_of(model, convert(model)), model_shapes(shapes, 2).places
    for site in ("linear", "experts", "ffn", "parallel"):
        assert sorted(ours.of(site)) == sorted(theirs.of(site)), site
    assert set(ours.refused) >= set(theirs.refused)


def banks_for(preset: str, family: str) -> dict[str, BankConfig]:
    full = expand(BankConfig(preset))
    more = {"num_tasks": 3} if full.router == "task" else {}
    targets = full.targets
    if family == "deepseek_v3" and full.site == "linear":
        targets = ("kv_a_proj_with_mqa", "layers.[12].self_attn.o_proj")
        if full.router == "prompt":
            targets = ("self_attn.kv_*", "o_proj")
    elif preset == "milora":
        targets = ("self_attn.[qkvo]_proj",)
    elif preset == "loramoe" and family != "deepseek_v3":
        targets = ("shared_expert.*_proj",) if family == "qwen2_moe" else ("q_proj", "o_proj")
    more |= {"adapters": ("a", "b", "c")} if preset in ("arrow", "mole", "x-lora") else {}
    return {"one": BankConfig(preset, targets, **more)}


def has_place(preset: str, family: str) -> bool:
    return expand(BankConfig(preset)).site != "ffn" or family == "deepseek_v3"


CASES = [(preset, family) for family in FAMILIES for preset in PRESETS if has_place(preset, family)]


@pytest.mark.parametrize(("preset", "family"), CASES)
def test_predicted_parameters_are_the_attached_ones(preset, family):
    model, banks = of_family(family), banks_for(preset, family)
    shapes = shapes_of(model)
    report = attach(model, banks, convert(model))
    found = bank_parameters(banks, shapes, 2)["one"]
    attached = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert found.total == sum(p.numel() for p in attached.values()) == sum(m.parameters for m in report.matches)
    assert found.of_experts == sum(p.numel() for p in attached.values() if p.address.is_expert)


@pytest.mark.parametrize(
    ("bank", "part"),
    [
        (BankConfig("expert-lora", r=8, rank_rule="per_active"), 4),
        (BankConfig("expert-lora", r=8, rank_rule="per_total"), 1),
        (BankConfig("mola", r=(2, 4), num_experts=(2, 6)), None),
        (BankConfig("moslora", num_experts=3, combine="sum"), None),
        (BankConfig("hydralora", mixer=True), None),
        (BankConfig("adamole", num_experts=(2, 3)), None),
        (BankConfig("mov", num_experts=4, combine="top_k", top_k=2), None),
    ],
)
def test_ranks_lists_and_mixers_are_counted_too(bank, part):
    model = of_family("qwen3_moe")
    shapes = shapes_of(model)
    report = attach(model, {"one": bank}, convert(model))
    assert bank_parameters({"one": bank}, shapes, 2)["one"].total == sum(report.trainable.values())
    if part:
        assert {m.r for m in report.matches} == {part}


def test_what_attach_would_refuse_the_plan_refuses():
    shapes = shapes_of(of_family("qwen3_moe"))
    for bank, part in [
        (BankConfig("mixlora"), "matches no dense feed-forward block"),
        (BankConfig("lora", ("lm_head",)), "output layer"),
        (BankConfig("lora", ("mlp.gate",)), "routers choose experts"),
        (BankConfig("mola", num_experts=(2, 3, 4)), "do not divide the model's 2 layers"),
    ]:
        with pytest.raises(PlanError, match=part):
            bank_parameters({"one": bank}, shapes, 2)


# -- bytes -------------------------------------------------------------------------------------------------------------

IDS = torch.arange(128).view(2, 64) * 7 % 64
TASKS = torch.arange(128) % 3
BATCH = Batch(tokens=128, sequence=64, width=4, heads=4, vocabulary=64)


def dense_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3, vocab_size=64)).train()


def step(model, hooks=None):
    with batch_context(BatchContext(shape=tuple(IDS.shape), task_T=TASKS)):
        with hooks or torch.enable_grad():
            loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()


def kept_for_backward(model) -> int:
    """Bytes of all storages that autograd keeps, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor, storage.nbytes()  # the tensor, so that no other gets its address
        return tensor

    step(model, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
    return sum(count for _, count in kept.values())


def built(preset: str, base: str, **more):
    """A model with the preset's bank, its shapes without it, and the bank."""
    model = dense_model() if base == "llama" else of_family("qwen3_moe").train()
    shapes = shapes_of(model)
    full = expand(BankConfig(preset))
    targets = ("q_proj", "o_proj") if preset == "loramoe" and base != "llama" else ()
    if preset == "milora" and base != "llama":
        targets = ("self_attn.*_proj",)
    more |= {"num_tasks": 3} if full.router == "task" else {}
    more |= {"adapters": ("a", "b", "c")} if full.score != "linear" else {}
    banks = {"one": BankConfig(preset, targets, **more)}
    attach(model, banks, [] if base == "llama" else convert(model))
    return model, shapes, banks


# As far as choices vary, the plan counts all experts; and experts keep whole groups of rows within their share.
ERRORS = {"mixlora-dynamic": 0.1, "expert-lora": 0.03, "expert-lora-shared": 0.03, "expert-lora-shared-outer": 0.03}


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset != "arrow"])
def test_predicted_bytes_for_backward_are_those_that_autograd_keeps(preset):
    site = expand(BankConfig(preset)).site
    for base in ("qwen3_moe",) if site in ("experts", "parallel") else ("llama",) if site == "ffn" else FAMILY_PAIR:
        model, shapes, banks = built(preset, base)
        found = model_shapes(shapes, 2)
        predicted = saved_bytes(found, found.resolve(banks), BATCH)
        measured = kept_for_backward(model)
        assert sum(predicted.values()) == pytest.approx(measured, rel=ERRORS.get(preset, 0.015)), base


def test_trained_adapters_are_weights_that_have_no_gradient():
    model, shapes, banks = built("mola", "llama", adapters=("a", "b", "c"))
    found = bank_parameters(banks, shapes, 2)["one"]
    adapter = {name: p for name, p in model.named_parameters() if ".adapter." in name}
    assert found.total == sum(p.numel() for name, p in adapter.items() if ".router." in name)
    assert found.frozen == sum(p.numel() for p in adapter.values()) - found.total
    predicted = saved_bytes(model_shapes(shapes, 2), model_shapes(shapes, 2).resolve(banks), BATCH)
    assert sum(predicted.values()) == pytest.approx(kept_for_backward(model), rel=0.015)
    model, shapes, banks = built("arrow", "llama")
    found = bank_parameters(banks, shapes, 2)["one"]
    assert (found.total, found.frozen) == (0, sum(p.numel() for n, p in model.named_parameters() if ".adapter." in n))


FAMILY_PAIR = ("qwen3_moe", "llama")


LARGER = {**MOE, "hidden_size": 128, "head_dim": 32, "moe_intermediate_size": 96, "num_hidden_layers": 3}


@pytest.mark.parametrize("preset", ["lora", "mola", "expert-lora", "perft-r"])
def test_predicted_peak_is_the_allocators(preset):
    """Not for tiny models, where buffers that the plan leaves out weigh as much as what it counts."""
    model = new_model("qwen3_moe", LARGER, vocab_size=512, seed=0, dtype=torch.float32).train()
    shapes, banks = shapes_of(model), {"one": BankConfig(preset)}
    attach(model, banks, convert(model))
    ids = torch.arange(512).view(4, 128)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    found = model_shapes(shapes, 2)
    placed, batch = found.resolve(banks), Batch(tokens=512, sequence=128, width=4, heads=4, vocabulary=512)
    gradients = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    predicted = sum(saved_bytes(found, placed, batch).values()) + working_bytes(placed, batch) + gradients
    assert predicted == pytest.approx(peak, rel=0.08)


# -- the command -------------------------------------------------------------------------------------------------------

RECIPE = """\
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
train: {steps: 20, global_batch_size: 8, micro_batch_size: 4, lr: 2e-4}
adapter:
  experts: {preset: expert-lora}
  attention: {preset: lora, r: 4}
"""


def test_the_plan_adds_up_and_says_what_can_be_had(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    plan = plan_adapters(load_recipe(path))
    experts, attention = plan.banks
    assert (experts.places, experts.layers, attention.places) == (4, 2, 4)
    # Two tensors of 64 -> 64 and 32 -> 64 for two experts a token: split LoRA costs 1 + 1.5 r (1/m + 1/n).
    assert experts.floor == 2 * 4 * 2 * (64 * 64 + 32 * 64)
    assert experts.added == 2 * 6 * 2 * 8 * (64 + 64 + 32 + 64)
    assert attention.added == 2 * 6 * 4 * (64 + 64 + 64 + 32)
    linear = 64 * (64 + 32 + 32 + 64)
    assert plan.floor == 4 * (2 * linear + 2 * 2 * (64 * 64 + 32 * 64) + 512 * 64)
    assert plan.trainable == sum(plan.run.trained.values()) == experts.trainable + attention.trainable
    run = plan.run
    assert plan.peak == run.weight_bytes + run.gradient_bytes + run.optimizer_bytes + plan.kept + plan.working
    assert [form for form, why in plan.exports.items() if not why] == ["peft", "peft-per-expert", "merged"]
    text = table(plan)
    assert "attention = lora: targets [q_proj, v_proj], site linear, r 4" in text
    assert re.search(rf"^in all +{plan.trainable:,} ", text, re.MULTILINE)
    assert "merges into the base  yes" in text

    routed = table(plan_adapters(load_recipe(path, ["adapter.attention={preset: mola}"])))
    assert "merges into the base  no: adapter.attention (mola)" in routed
    assert "exact exports  only the adapter folder itself" in routed
    twice = plan_adapters(load_recipe(path, ["adapter.attention={preset: x-lora, num_experts: 2, r: 4}"]))
    assert twice.first_pass == 2 * (2 * linear + 2 * 2 * (64 * 64 + 32 * 64)), "forward alone, without the output layer"
    assert twice.floor == plan.floor
    whole = twice.floor + twice.first_pass + sum(bank.added for bank in twice.banks)
    assert f"{whole / twice.floor:.3f}x" in table(twice)
    assert f"with a first pass without adapters, {twice.first_pass:,} operations" in table(twice)
    with pytest.raises(PlanError, match="no section adapter"):
        plan_adapters(load_recipe(path, ["adapter={}"]))


def test_a_preset_is_printed_with_formula_defaults_paper_and_what_is_open():
    text = presets_text("mixlora")
    for part in ("arXiv 2404.15159", "y = sum over S of g_e F_e(x)", "Not verified: the coefficient", "top_k 2"):
        assert part in text
    assert all(preset in presets_text(None) for preset in PRESETS)
    with pytest.raises(PlanError, match="no preset 'mixlor'"):
        presets_text("mixlor")


def test_the_command_needs_no_torch(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    code = (
        "import sys; from trainer.cli import main; "
        f"assert main(['adapter', 'plan', {str(path)!r}, 'adapter.attention.r=2']) == 0; "
        "assert main(['adapter', 'presets', 'mov']) == 0; assert main(['adapter', 'presets', 'no']) == 2; "
        "assert not {'torch', 'transformers', 'deepspeed'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "attention = lora: targets [q_proj, v_proj], site linear, r 2" in done.stdout
    assert "MoV (arXiv 2309.05444)" in done.stdout
