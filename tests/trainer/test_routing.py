"""From a recipe's routing and balance to gates, and to configurations of transformers."""

from types import SimpleNamespace

import pytest
import torch

from moe.convert import convert
from moe.families import find_moe_blocks
from moe.gates import Gate
from moe.routing import RouterSpec, RoutingError, scores, spec_of
from moe.stats import RoutingMeter
from tests.moe.tiny_families import tiny
from trainer.plan import plan_run
from trainer.recipe import RecipeError, load_recipe, recipe_fingerprint, recipe_to_yaml
from trainer.routing import balance_of, inexpressible, policy_of, prepare_gates, set_routing

QUICKSTART = "recipes/quickstart.yaml"
ALONE = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"))


def recipe(*overrides):
    return load_recipe(QUICKSTART, overrides)


def policy(*overrides, own=None):
    return policy_of(recipe(*overrides).routing, own or RouterSpec(32, 4, norm_topk=True, weights_like_logits=True))


def test_methods_have_their_papers_numbers():
    switch = policy("routing={method: switch, jitter: 0.01, capacity_factor: 1.25}")
    assert (switch.spec.top_k, switch.spec.norm_topk, switch.spec.score) == (1, False, "softmax")
    assert (switch.jitter, switch.capacity_factor, switch.random_second) == (0.01, 1.25, False)
    gshard = policy("routing.method=gshard")
    assert (gshard.spec.top_k, gshard.spec.norm_topk) == (2, True)
    assert (gshard.capacity_factor, gshard.random_second) == (1.0, True)
    limited = policy("routing={method: top_k, score: sigmoid, top_k: 6, n_group: 8, topk_group: 3, group_score: top2}")
    assert limited.spec == RouterSpec(32, 6, "sigmoid", True, 1e-20, n_group=8, topk_group=3, group_score="top2",
                                      weights_like_logits=True)  # fmt: skip
    assert limited.capacity_factor is None
    assert policy("routing={method: expert_choice, force: true}", "model.router_aux_loss_coef=0").choice == "expert"


def test_keys_that_are_not_given_are_the_models_own():
    own = RouterSpec(32, 4, "sigmoid", True, 1e-20, 2.5, 4, 2, "top2", fp32_linear=True, ordered=False)
    assert policy("routing.method=top_k", own=own).spec == own
    assert policy("routing={method: top_k, top_k: 2}", own=own).spec.differences(own) == ["top_k"]


@pytest.mark.parametrize("section", ["{method: top_k, top_k: 5, capacity_factor: 0.5}", "{method: gshard}"])
def test_first_choices_go_before_second_ones_in_a_family_whose_own_are_in_any_order(section):
    """DeepSeek's routers do not sort what they choose, which is no difference until some of it is dropped."""
    model = tiny("deepseek_v3", n_routed_experts=32, n_group=1, topk_group=1)
    prepare_gates(recipe(f"routing={section}"), ALONE, model, convert(model), RoutingMeter())
    block = find_moe_blocks(model)[0]
    logits, _, index = block.gate(torch.randn(64, 32, generator=torch.Generator().manual_seed(1)))
    best = (scores(logits, block.gate.policy.spec) + block.gate.e_score_correction_bias).gather(1, index)
    assert bool((best[:, :-1] >= best[:, 1:]).all()), "the best of a token's choices must come first"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("routing.jitter=0.1", "routing.jitter needs a routing.method"),
        ("routing={method: switch, top_k: 2}", "routing.top_k is decided by routing.method=switch"),
        ("routing.method=expert_choice", "sees its own future"),
        ("routing={method: top_k, n_group: 16, topk_group: 1, top_k: 4}", "have 2 experts, and a token chooses 4"),
        ("routing={method: top_k, force: true}", "routing.force is for"),
        ("routing={method: top_k, n_group: 4}", "limits nothing; give routing.topk_group"),
        ("routing={method: top_k, topk_group: 4}", "give routing.n_group"),
        ("routing={method: top_k, n_group: 4, topk_group: 5}", "more than routing.n_group=4"),
        ("routing={method: top_k, n_group: 5, topk_group: 2}", "does not divide model.num_experts=32"),
        ("routing={method: top_k, top_k: 33}", "more than model.num_experts=32"),
        ("routing={method: top_k, drop_by: position}", "drops nothing without routing.capacity_factor"),
        ("routing={method: topk}", "did you mean 'top_k'"),
        ("balance={aux_loss: sequence, aux_loss_coef: 0.1}", "keep one of them"),
        ("balance.aux_loss_coef=0.1", "give balance.aux_loss, too"),
        ("balance={aux_loss: hf}", "give balance.aux_loss_coef, too"),
        ("balance.bias_rate=0.1", "unknown key balance.bias_rate"),
        ("routing={method: expert_choice, force: true}", "model.router_aux_loss_coef: experts that choose"),
        ("routing={method: top_k, group_score: max}", "routing.group_score compares groups, and there are none"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(override, says):
    with pytest.raises(RecipeError) as refused:
        recipe(override)
    assert says in str(refused.value)


@pytest.mark.parametrize("key", ["train.replay_trace=balanced", "log.routing_trace=true"])
def test_a_trace_of_experts_that_choose_is_refused(key):
    with pytest.raises(RecipeError, match="is of tokens that choose experts"):
        recipe("routing={method: expert_choice, force: true}", "model.router_aux_loss_coef=0", key)


def test_an_adapter_leaves_the_base_models_routing_alone(tmp_path):
    overrides = ["adapter={a: {preset: expert-lora, r: 2, alpha: 4}}", "routing.method=top_k"]
    with pytest.raises(RecipeError, match="which an adapter leaves as it is"):
        recipe(*overrides, "balance.bias_update_rate=0.1")


def test_a_recipe_without_the_sections_keeps_its_fingerprint_and_others_change_it(tmp_path):
    plain = recipe()
    assert "\nrouting:" not in recipe_to_yaml(plain)
    changed = recipe("routing={method: top_k, score: sigmoid}", "balance.bias_update_rate=0.001")
    assert recipe_fingerprint(plain) != recipe_fingerprint(changed)
    copy = tmp_path / "quickstart.yaml"
    copy.write_text(recipe_to_yaml(changed))
    assert (load_recipe(copy).routing, load_recipe(copy).balance) == (changed.routing, changed.balance)


def test_the_plan_counts_the_experts_that_a_token_uses():
    plain, switch = plan_run(recipe()).share, plan_run(recipe("routing.method=switch")).share
    assert (plain.top_k, switch.top_k) == (4, 1)


def test_losses_come_from_the_recipe_and_devices_from_groups_or_workers():
    spec = RouterSpec(32, 4)
    assert balance_of(recipe(), spec).aux_coef == 0.01
    coefs = "balance={device_loss_coef: 0.1, communication_loss_coef: 0.2}"
    found = balance_of(recipe(coefs), spec)
    assert (found.devices, found.device_limit) == (2, 2)  # parallel.ep
    found = balance_of(recipe(coefs), RouterSpec(32, 4, n_group=8, topk_group=3))
    assert (found.devices, found.device_limit) == (8, 3)
    alone = recipe(coefs, "parallel={workers: 1, ep: 1}")
    with pytest.raises(RoutingError, match="there is only one"):
        balance_of(alone, spec)


@pytest.mark.parametrize("section", ["", "routing.method=top_k", "balance.bias_update_rate=0.1"])
def test_a_gate_is_replaced_only_if_it_routes_otherwise(section):
    model = tiny("qwen3_moe")
    bias = prepare_gates(recipe(*[section][: bool(section)]), ALONE, model, convert(model), RoutingMeter())
    gates = [block.gate for block in find_moe_blocks(model)]
    assert all(isinstance(gate, Gate) == bool(section) for gate in gates)
    assert (bias is not None) == section.startswith("balance")
    assert all((gate.bias_E is not None) == (bias is not None) for gate in gates if section)


@pytest.mark.parametrize(
    ("family", "section", "says"),
    [
        ("qwen3_moe", "routing={method: top_k, top_k: 2, norm_topk_prob: false}", None),
        ("qwen3_moe", "routing={method: switch, jitter: 0.1, capacity_factor: 1.0}", None),
        (
            "qwen3_moe",
            "routing={method: top_k, score: sigmoid}",
            "routes with routing.score=softmax where this run has routing.score=sigmoid",
        ),
        (
            "qwen3_moe",
            "routing={method: top_k, n_group: 4, topk_group: 2}",
            "has routing.n_group=4, routing.topk_group=2",
        ),
        ("qwen3_moe", "balance.bias_update_rate=0.1", "has no selection bias"),
        (
            "mixtral",
            "routing.method=switch",
            "routing.norm_topk_prob=true where this run has routing.norm_topk_prob=false",
        ),
        (
            "gpt_oss",
            "routing={method: top_k, score: softmax, norm_topk_prob: true, routed_scaling_factor: 2.0}",
            "gpt_oss in transformers routes with routing.score=topk_softmax, routing.norm_topk_prob=false, "
            "routing.routed_scaling_factor=1.0 where this run has routing.score=softmax, "
            "routing.norm_topk_prob=true, routing.routed_scaling_factor=2.0",
        ),
        ("deepseek_v2", "routing={method: top_k, n_group: 2, topk_group: 2, top_k: 4}", None),
        ("deepseek_v3", "routing={method: top_k, n_group: 2, topk_group: 1}", None),
        ("deepseek_v3", "routing={method: top_k, capacity_factor: 1.0}", None),
        ("deepseek_v3", "balance.bias_update_rate=0.1", None),
        (
            "deepseek_v3",
            "routing={method: top_k, n_group: 4, topk_group: 2, group_score: max}",
            "routing.group_score=max",
        ),
        ("gpt_oss", "routing={method: top_k, top_k: 1}", None),
    ],
)
def test_what_transformers_can_do_is_written_and_the_rest_is_named(family, section, says):
    model = tiny(family)
    wanted = recipe(section)
    problems = inexpressible(wanted, model.config)
    if says is not None:
        assert len(problems) == 1
        assert says in problems[0]
        return
    assert problems == []
    own = spec_of(find_moe_blocks(model)[0].gate, model.config)
    set_routing(wanted, model, None)
    rebuilt = find_moe_blocks(type(model)(model.config))[0].gate
    assert spec_of(rebuilt, model.config).differences(policy_of(wanted.routing, own).spec) == []


def test_trained_biases_go_to_the_familys_own_buffers():
    model, wanted = tiny("deepseek_v3"), recipe("balance.bias_update_rate=0.1")
    bias = prepare_gates(wanted, ALONE, model, convert(model), RoutingMeter())
    own = [block.gate.e_score_correction_bias for block in find_moe_blocks(tiny("deepseek_v3"))]
    assert torch.equal(bias.bias_ME, torch.stack(own)), "balance must begin with the model's own biases"
    bias.bias_ME.normal_()
    exported = tiny("deepseek_v3")
    with_more = bias.dump() + torch.zeros(8).numpy().tobytes()  # of a module that only training has
    for blob in (bias.dump(), with_more):
        set_routing(wanted, exported, blob)
        state = exported.state_dict()
        for layer in (0, 1):
            assert torch.equal(state[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"], bias.row(layer))
    other = tiny("qwen3_moe")
    before = list(other.state_dict())
    set_routing(wanted, other, bias.dump())
    assert list(other.state_dict()) == before


def test_a_model_without_routers_has_nothing_to_balance():
    assert prepare_gates(recipe(), ALONE, torch.nn.Linear(2, 2), [], RoutingMeter()) is None
    with pytest.raises(RoutingError, match="no layer of this model has a router"):
        prepare_gates(recipe("balance.z_loss_coef=0.1"), ALONE, torch.nn.Linear(2, 2), [], RoutingMeter())
