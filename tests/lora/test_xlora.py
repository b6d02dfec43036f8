"""X-LoRA: adapters weighed by the base model's last states, from a first pass that has nothing of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lora.attach import attach
from lora.config import BankConfig
from lora.errors import AdapterError
from lora.exactness import FORMS, obstacles, require
from lora.format import apply_adapter, collect_adapter, load_adapter, save_adapter
from lora.linear import RoutedLinear
from lora.presets import bank_at, expand, expansion
from lora.trained import fill
from lora.watch import AdapterWatch
from moe.balance import BalanceLosses, BalanceSpec
from moe.context import BatchContext, batch_context
from moe.convert import convert
from moe.gates import observe_gates
from moe.stats import RoutingMeter
from tests.lora import reference_xlora

TOKENS = torch.arange(12).view(2, 6) * 5 % 64
MASK = torch.tensor([1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]).bool()
REAL = [t for t in range(12) if MASK[t]]
FOLDERS = ("a", "b", "c")
BANKS = {
    "adapters": BankConfig("x-lora", adapters=FOLDERS, r=3),
    "cooler": BankConfig("x-lora", ("v_proj", "down_proj"), adapters=FOLDERS, r=3, temperature=0.4),
    "the best two": BankConfig("x-lora", adapters=FOLDERS, r=3, combine="top_k", renormalise=False),
    "trained too": BankConfig(
        "x-lora", num_experts=4, r=3, combine="top_k", balance="switch", router_aux_loss_coef=0.7
    ),
}


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {path: p for path, p in model.named_parameters() if ".adapter." in path}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", BANKS)
def test_outputs_losses_and_all_gradients_over_three_steps(tiny_dense, adapted, name, recompute):
    bank, base = BANKS[name], tiny_dense().double().eval()
    full, here = expand(bank), bank_at(bank, 0, 2)
    model = adapted(tiny_dense().double(), {"one": bank}).train()
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    slow = {path: p.detach().clone().requires_grad_(p.requires_grad) for path, p in values_of(model).items()}
    trained = [{path: p for path, p in own.items() if p.requires_grad} for own in (values_of(model), slow)]
    assert all((".router." in path) or not bank.adapters for path in trained[0])
    optimizers = [torch.optim.SGD(own.values(), lr=0.05) for own in trained]
    passes: list[int] = []
    model.model.norm.register_forward_hook(lambda *_: passes.append(1))
    for step in range(3):
        tokens = (TOKENS + step) % 64
        for optimizer in optimizers:
            optimizer.zero_grad()
        passes.clear()
        with batch_context(BatchContext(0.5, shape=(2, 6), mask_T=MASK)):
            logits = model(tokens, use_cache=False).logits
            logits.flatten(0, 1)[MASK].sin().sum().backward()
        assert len(passes) == 2, "one pass without adapters, one with, and none again in backward"
        top_k = full.top_k if full.combine == "top_k" else 99
        want, loss = reference_xlora.run(
            base, slow, here.scale, tokens, REAL, full.temperature, top_k, full.renormalise
        )
        torch.testing.assert_close(logits, want, rtol=1e-9, atol=1e-10)
        (want.flatten(0, 1)[MASK].sin().sum() + 0.5 * full.router_aux_loss_coef * loss).backward()
        for (path, p), q in zip(trained[0].items(), trained[1].values(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-10, msg=lambda m, n=path: f"{n}: {m}")
        for optimizer in optimizers:
            optimizer.step()


def test_the_first_pass_has_no_adapter_of_any_bank(tiny_moe, tiny_dense, adapted):
    x_lora = BankConfig("x-lora", ("q_proj",), num_experts=2, r=2)
    mixture = {
        "x": x_lora,
        "lora": BankConfig("lora", ("k_proj",), r=2),
        "prompted": BankConfig("milora", ("v_proj", "o_proj"), r=2, top_k=2),
        "experts": BankConfig("expert-lora", r=2),
        "beside": BankConfig("perft-r", r=2),
    }
    for build, banks in (
        (tiny_moe, mixture),
        (tiny_moe, {"x": x_lora, "following": BankConfig("perft-e", r=2)}),
        (tiny_dense, {"x": x_lora, "ffn": BankConfig("mixlora", num_experts=3, r=2)}),
    ):
        base, model = build().eval(), adapted(build(), banks)
        router = model.model.layers[1].self_attn.q_proj.adapter.router
        seen = []
        model.lm_head.register_forward_pre_hook(
            lambda *_, router=router, seen=seen: seen.append(router.first_pass.states(12, "here"))
        )
        with torch.no_grad():
            want = base(TOKENS, output_hidden_states=True).hidden_states[-1].flatten(0, 1)
            moved = model(TOKENS, output_hidden_states=True).hidden_states[-1].flatten(0, 1)
        torch.testing.assert_close(seen[0], want, rtol=1e-4, atol=1e-5)
        assert (moved - want).norm() > 0.1 * want.norm()


def test_statistics_and_losses_of_routing_are_those_of_the_second_pass(tiny_moe, adapted):
    def run(coef: float):
        model = tiny_moe()
        blocks, meter = convert(model), RoutingMeter()
        attach(model, {"x": BankConfig("x-lora", num_experts=2, r=2)}, blocks)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in values_of(model).values():
                parameter.normal_(0, 0.4, generator=generator)
        chosen, told, counted = [], {}, []
        for block in blocks:
            block.gate.register_forward_hook(lambda _gate, _args, out, at=block.layer: chosen.append((at, out[2])))
        losses = BalanceLosses(BalanceSpec(aux="hf", aux_coef=coef))
        count = losses._count
        losses._count = lambda layer, *rest: (counted.append(layer), count(layer, *rest))
        observe_gates(blocks, model.config, meter, losses)
        context = BatchContext(shape=(2, 6), record=lambda layer, index_TK, _: told.update({layer: index_TK}))
        with batch_context(context):
            model.train()(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        assert [layer for layer, _ in chosen] == [0, 1, 0, 1]
        assert all(torch.equal(told[layer], index_TK) for layer, index_TK in chosen[2:])
        assert meter.take().counts_ME.sum() == 2 * 12 * 2  # layers, tokens, choices: once
        return counted, torch.cat([p.grad.flatten() for p in values_of(model).values()])

    (nothing, free), (counted, pulled) = run(0.0), run(0.5)
    assert (nothing, counted) == ([], [0, 1])
    assert not torch.equal(free, pulled), "the balance loss of layer 1 reaches the adapters of layer 0"


# -- generation --------------------------------------------------------------------------------------------------------


def test_it_generates_without_a_cache_and_refuses_one(tiny_dense, adapted):
    model, prompt = adapted(tiny_dense(), {"x": BankConfig("x-lora", num_experts=3, r=2)}, std=0.5), TOKENS[:1]
    found = model.generate(prompt, max_new_tokens=5, do_sample=False, use_cache=False)
    expected = prompt
    with torch.no_grad():
        for _ in range(5):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, expected)
    with pytest.raises(AdapterError, match="generate with use_cache=False"):
        model.generate(prompt, max_new_tokens=5, do_sample=False, use_cache=True)
    cache = DynamicCache(config=model.config)
    tiny_dense()(prompt, past_key_values=cache)
    with pytest.raises(AdapterError, match="generate with use_cache=False"):
        model(prompt, past_key_values=cache)


def test_without_the_model_there_is_no_first_pass(tiny_dense, adapted):
    bank = BankConfig("x-lora", ("q_proj",), num_experts=3, r=2)
    layer = RoutedLinear(nn.Linear(6, 9), bank_at(bank, 0, 1), "layers.0.q_proj", hidden=6)
    with pytest.raises(AdapterError, match=r"layers\.0\.q_proj\.adapter\.router: score: states needs the whole model"):
        layer(torch.zeros(2, 6))
    model = adapted(tiny_dense(), {"x": bank})
    model(TOKENS)  # whose states are not taken for another call's
    with pytest.raises(AdapterError, match="there was no first pass; call the model"):
        model.model(TOKENS)


# -- what is around it -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tiny_dense, adapted, tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    for i, name in enumerate(FOLDERS):
        banks = {"a": BankConfig("lora", r=2 + i, alpha=4.0)}
        save_adapter(root / name, collect_adapter(adapted(tiny_dense(), banks, std=0.1 * (i + 1))), banks, "base")
    return tuple(str(root / name) for name in FOLDERS)


def test_over_real_adapters_the_heads_train_alone_and_the_folder_comes_back(tiny_dense, folders, tmp_path):
    banks, model = {"one": BankConfig("x-lora", adapters=folders, r=4)}, tiny_dense()
    report = attach(model, banks, [])
    fill(model, banks, "base")
    assert report.trainable == {"bank routers": 2 * 2 * 3 * (32 + 1)}
    before = {path: p.detach().clone() for path, p in model.named_parameters()}
    watch = AdapterWatch(model.train())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        with batch_context(BatchContext(shape=tuple(TOKENS.shape))):
            model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        watch.check()
        optimizer.step()
    assert watch.done
    moved = {path for path, p in model.named_parameters() if not torch.equal(p, before[path])}
    assert moved == {path for path in before if ".router." in path}

    save_adapter(tmp_path / "x", collect_adapter(model), banks, "base")
    again = tiny_dense().eval()
    apply_adapter(again, load_adapter(tmp_path / "x"), base_fingerprint="base")
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model.eval()(TOKENS).logits)
    assert '"MOE_BANK"' in (tmp_path / "x" / "adapter_config.json").read_text()


def test_no_other_form_is_exact():
    banks = {"one": BankConfig("x-lora", adapters=FOLDERS)}
    assert all(obstacles(banks)[form] for form in FORMS)
    with pytest.raises(AdapterError, match=r"adapter\.one \(x-lora\) weighs its experts by a router for each token"):
        require("peft", banks)


def test_its_expansion_is_printed():
    assert expansion(BankConfig("x-lora", adapters=("a", "b"), r=4)) == (
        "x-lora: targets [q_proj, v_proj], site linear, adapters [a, b], num_experts 2, r 4, share none, kind lowrank, "
        "mixer false, dropout 0.0, router_init kaiming, router token, score states, temperature 1.0, jitter 0.0, "
        "combine soft, balance none, z_loss_coef 0.0"
    )
