"""What optional parts of the model need of the rest of the recipe."""

import pytest

from moe.build import new_model
from moe.mtp import attach_mtp
from trainer.build import shape_fields
from trainer.family_shapes import family_shapes
from trainer.plan import plan_run
from trainer.recipe import RecipeError, load_recipe
from trainer.variant_shapes import mtp_shapes, soft_shapes

RECIPE = """\
model: {family: qwen3_moe, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1,
        moe_intermediate_size: 24, num_experts: 6, num_experts_per_tok: 2}
data: {source: stdlib, include: ["json/*.py"], tokenizer: {kind: bytes}, sequence_length: 24}
train: {steps: 20, global_batch_size: 8, micro_batch_size: 8, lr: 3e-3}
"""


CHOSEN = ["model={path: somewhere, trainable_experts: e.json}", "data.tokenizer={kind: model}"]
FROZEN = ["model={path: somewhere, frozen_experts: 2}", "data.tokenizer={kind: model}"]


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return lambda *overrides: load_recipe(path, overrides)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.mtp.weight=0.1"], "without train.mtp.depth"),
        (["train.mtp.depth=23"], "looks 24 tokens ahead"),
        (["model.frozen_experts=2"], "give model.path"),
        (["model.trainable_experts=e.json"], "model.trainable_experts are of a trained model; give model.path"),
        ([*CHOSEN, "adapter={a: {preset: expert-lora}}"], "adapter and model.trainable_experts each say what trains"),
        ([*CHOSEN, "model.frozen_experts=1"], "model.frozen_experts and model.trainable_experts each"),
        ([*CHOSEN, "checkpoint.mode=pec"], "frozen ones have no state; use wal or dense"),
        ([*FROZEN, "parallel={workers: 2, ep: 2}"], "frozen experts only"),
        ([*FROZEN, "checkpoint.mode=pec"], "frozen ones have no state"),
        ([*FROZEN, "adapter={a: {preset: expert-lora}}"], "adapter and model.frozen_experts each"),
        ([*FROZEN, "train.mtp.depth=1"], "train.mtp and model.frozen_experts each"),
        ([*FROZEN, "model.soft={kind: merging, segment: 2}"], "model.soft and model.frozen_experts each"),
        (["model.soft={kind: soft_moe}"], "see those after it"),
        (["model.soft={kind: merging}"], "model.soft.segment or set model.soft.force"),
        (["model.soft={kind: merging, slots: 2, segment: 4}"], "belongs to model.soft.kind soft_moe"),
        (["model.soft={segment: 4}"], "belongs to model.soft.kind merging"),
        (["model.soft={kind: merging, segment: 4}", "parallel={workers: 2, ep: 2}"], "set it to 1"),
        (["model.soft={kind: merging, segment: 4}", "model.router_aux_loss_coef=0.1"], "nothing to balance"),
        (["model.soft={kind: merging, segment: 4}", "log.routing_trace=true"], "no routing to record or follow"),
        (["model.soft={kind: merging, segment: 4}", "checkpoint.mode=pec"], "a soft block routes none"),
        (["model.soft={kind: merging, segment: 4}", "adapter={a: {preset: expert-lora}}"], "routed experts"),
        (["model.soft={kind: merging, segment: 4}", "train.mtp.depth=1"], "routed experts of their own"),
        (["model.experts_backend=triton", "adapter={a: {preset: expert-lora}}"], "no room for an adapter"),
        (["train.mtp.depth=1", "adapter={a: {preset: expert-lora}}"], "all but adapters is frozen"),
    ],
)
def test_combinations_that_cannot_work_are_refused(load, overrides, said):
    with pytest.raises(RecipeError, match=said):
        load(*overrides)


@pytest.mark.parametrize("soft", ["{kind: soft_moe, slots: 3, force: true}", "{kind: merging, segment: 4}",
                                  "{kind: merging, force: true}"])  # fmt: skip
def test_the_plan_counts_soft_blocks_as_they_are_built(load, soft):
    import torch

    from trainer.build import build_model
    from trainer.rendezvous import Process

    recipe = load(f"model.soft={soft}")
    process = Process(0, 1, 0, torch.device("cpu"))
    model, blocks = build_model(recipe, process, 257)
    assert blocks == []
    theirs = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert soft_shapes(family_shapes(recipe.model, 257), recipe.model.soft) == theirs
    assert sum(plan_run(recipe).total.values()) == sum(p.numel() for p in model.parameters())


def test_the_plan_counts_prediction_modules_as_they_are_built(load):
    import torch

    recipe = load("train.mtp={depth: 2}")
    model = new_model("qwen3_moe", shape_fields(recipe), vocab_size=257, seed=0, dtype=torch.float32)
    before = dict(model.named_parameters())
    attach_mtp(model, 2, 0.3, seed=0)
    theirs = {name: tuple(p.shape) for name, p in model.named_parameters() if name not in before}
    assert mtp_shapes(family_shapes(recipe.model, 257), 2) == theirs
    assert sum(plan_run(recipe).total.values()) == sum(p.numel() for p in model.parameters())


def test_prediction_modules_have_a_place_in_deepspeeds_folders(load):
    import torch

    from checkpointing.deepspeed_format import DeepSpeedFolder
    from moe.load import persistent_buffers
    from trainer.export import buffers_of

    latent = (
        "kv_lora_rank: 8, qk_rope_head_dim: 8, qk_nope_head_dim: 8, v_head_dim: 8, n_shared_experts: 1, n_group: 2, "
        "topk_group: 1, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, moe_intermediate_size: 8, "
        "num_experts: 8, num_experts_per_tok: 2"
    )
    recipe = load(f"model={{family: deepseek_v3, {latent}}}", "train.mtp={depth: 2}")
    model = new_model("deepseek_v3", shape_fields(recipe), vocab_size=257, seed=0, dtype=torch.float32)
    attach_mtp(model, 2, 0.3, seed=0)
    found = buffers_of(recipe, {name: p.detach() for name, p in model.named_parameters()})
    assert {name: t.shape for name, t in found.items()} == {
        name: t.shape for name, t in persistent_buffers(model).items()
    }
    for name, parameter in model.mtp.named_parameters(prefix="mtp"):
        shapes = [{name: parameter.shape}]
        states = {"base_optimizer_state": {"param_groups": [{}]}}
        folder = DeepSpeedFolder("tag", {"param_shapes": shapes}, [states], {})
        assert folder.address_of(name, 0, 0) == parameter.address
