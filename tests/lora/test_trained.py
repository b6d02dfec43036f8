"""Banks of trained adapters: Arrow equals its formula, gates train and factors do not, files come back."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora.attach import attach
from lora.config import BankConfig
from lora.errors import AdapterError
from lora.format import apply_adapter, collect_adapter, load_adapter, save_adapter
from lora.linear import RoutedLinear
from lora.presets import bank_at
from lora.trained import arrow_of, fill, frozen_tensors, principal_direction
from lora.watch import AdapterWatch
from moe.context import BatchContext, batch_context
from tests.lora.reference_arrow import arrow, direction
from tests.lora.reference_linear import REFERENCES, Facts
from tests.lora.reference_mole import mole, product_loss

TOKENS = torch.arange(24).view(2, 12)
# Ranks, scales and forms differ; all of them are exactly LoRA on the same layers.
SOURCES = {
    "one": {"a": BankConfig("lora", r=4, alpha=3.0)},
    "two": {"a": BankConfig("rslora", ("q_proj",), r=3, alpha=5.0), "b": BankConfig("lora", ("v_proj",), r=2)},
    "three": {"a": BankConfig("moslora", r=4)},
}


@pytest.fixture(scope="module")
def folders(tiny_dense, tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    for seed, (name, banks) in enumerate(SOURCES.items()):
        model = tiny_dense()
        attach(model, banks, [])
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if ".adapter." in path:
                    parameter.normal_(0, 0.3, generator=generator)
        save_adapter(root / name, collect_adapter(model), banks, "base-1")
    return tuple(str(root / name) for name in SOURCES)


def plain(folder, place):
    """A, B and scale of one adapter at a place, by hand."""
    adapter = load_adapter(folder)
    of = {name: adapter.tensors.get(f"{place}.adapter.{name}") for name in "ABC"}
    a = of["A"][0].double() if of["C"] is None else of["C"][0].double() @ of["A"][0].double()
    bank = adapter.banks["b" if "v_proj" in place and "b" in adapter.banks else "a"]
    return a, of["B"][0].double(), bank.alpha / (bank.r**0.5 if bank.scaling == "sqrt_r" else bank.r)


def test_a_direction_is_the_top_right_singular_vector():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 7, generator=generator), torch.randn(9, 3, generator=generator)
    v = principal_direction(a, b)
    assert torch.allclose(v.norm(), torch.ones((), dtype=torch.float64))
    assert v[v.abs().argmax()] > 0
    torch.testing.assert_close((v @ direction(a, b)).abs(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(
        (b.double() @ (a.double() @ v)).norm(), torch.linalg.matrix_norm(b.double() @ a.double(), 2)
    )


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.5), (3, 2.0)])
def test_arrow_equals_its_formula_forward_and_backward(tiny_dense, folders, top_k, temperature):
    model = tiny_dense().double()
    bank = BankConfig("arrow", adapters=folders, top_k=top_k, temperature=temperature)
    attach(model, {"one": bank}, [])
    fill(model, {"one": bank}, "base-1")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    generator = torch.Generator().manual_seed(5)
    for place in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"):
        layer, adapters = model.get_submodule(place), [plain(folder, place) for folder in folders]
        for _ in range(3):
            x = torch.randn(2, 6, 32, dtype=torch.float64, generator=generator, requires_grad=True)
            z = x.detach().clone().requires_grad_()
            y = layer(x)
            want = torch.stack(arrow(layer.weight, adapters, z.view(-1, 32), top_k, temperature))
            # The bank keeps its factors in fp32 before they are loaded, so a few roundings separate the two.
            torch.testing.assert_close(y.view(-1, y.shape[-1]), want, rtol=3e-6, atol=3e-6)
            y.sin().sum().backward()
            want.sin().sum().backward()
            torch.testing.assert_close(x.grad, z.grad, rtol=1e-5, atol=1e-5)


MASK = torch.tensor([1, 1, 1, 1, 1, 1, 1, 1, 1, 0]).bool()
REAL = [t for t in range(10) if MASK[t]]
FOUR = ("a", "b", "c", "d")
GATED = {
    "mole": BankConfig("mole", adapters=FOUR, r=3, router_aux_loss_coef=0.7),
    "mole in each layer": BankConfig("mole", adapters=FOUR, r=3, router_aux_loss_coef=0.7, balance_pooled=False),
    "mole without a loss": BankConfig("mole", adapters=FOUR, r=3, balance="none", temperature=0.4),
    "mola": BankConfig("mola", adapters=FOUR, r=3, router_aux_loss_coef=0.7, z_loss_coef=0.3),
}


def two_layers(bank: BankConfig) -> nn.ModuleList:
    layers = nn.ModuleList()
    for i in range(2):
        torch.manual_seed(i)
        layers.append(RoutedLinear(nn.Linear(6, 9, dtype=torch.float64), bank_at(bank, 0, 1), f"layers.{i}.q_proj"))
        with torch.no_grad():
            for name, parameter in layers[-1].named_parameters():
                if not name.endswith("temperature"):
                    parameter.normal_(0, 0.5)
    return layers.requires_grad_(False)


def expected(layers, x, bank):
    """Outputs of both layers, and the sum of the losses."""
    rows, loss = [], torch.zeros((), dtype=torch.float64)
    named = [dict(layer.named_parameters()) for layer in layers]
    if bank.preset == "mola":
        facts = Facts(REAL, numbers={"balance": 0.7, "z": 0.3, "top_k": 2, "renormalise": True})
        found = [REFERENCES["mola"](p, x, layers[0].adapter.here.scale, facts) for p in named]
        return [torch.stack(one.rows) for one in found], sum(one.loss for one in found)
    found = [mole(p, x, layers[0].adapter.here.scale) for p in named]
    rows = [torch.stack(one) for one, _ in found]
    if bank.balance == "none":
        return rows, loss
    gates = [one for _, one in found]
    sets = [gates] if bank.balance_pooled is None else [[one] for one in gates]
    return rows, sum(0.7 * product_loss(one, REAL) for one in sets)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("method", GATED)
def test_gates_over_trained_adapters_equal_the_formula_over_three_steps(method, recomputed):
    bank = GATED[method]
    fast, slow = two_layers(bank), two_layers(bank)
    gates = [[p for n, p in one.named_parameters() if ".router." in n] for one in (fast, slow)]
    for parameter in (*gates[0], *gates[1]):
        parameter.requires_grad_()
    optimizers = [torch.optim.SGD(those, lr=0.01) for those in gates]
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for micro in range(2):  # two passes are accumulated, each with half the loss
            x = torch.randn(10, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + micro))
            x_fast, x_slow = x.clone().requires_grad_(), x.clone().requires_grad_()
            with batch_context(BatchContext(0.5, shape=(2, 5), mask_T=MASK)):
                run = [
                    lambda z, one=one: checkpoint(one, z, use_reentrant=False) if recomputed else one(z) for one in fast
                ]
                found = [one(x_fast) for one in run]
                (0.5 * sum(y[MASK].sin().sum() for y in found)).backward()
            want, loss = expected(slow, x_slow, bank)
            for y, rows in zip(found, want, strict=True):
                torch.testing.assert_close(y, rows, rtol=1e-10, atol=1e-11)
            (0.5 * (sum(rows[MASK].sin().sum() for rows in want) + loss)).backward()
            torch.testing.assert_close(x_fast.grad, x_slow.grad, rtol=1e-9, atol=1e-11)
        for p, q in zip(*gates, strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11)
        for optimizer in optimizers:
            optimizer.step()
    assert all(p.grad is None for layer in fast for n, p in layer.named_parameters() if ".router." not in n)


@pytest.mark.parametrize("preset", ["arrow", "mole", "mola"])
def test_no_tokens_give_gradients_of_zero(preset):
    layer = RoutedLinear(nn.Linear(6, 9), bank_at(BankConfig(preset, adapters=FOUR, r=3), 0, 1), "layers.0.q_proj")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(0.1)
    with batch_context(BatchContext(shape=(0, 5))):
        layer(torch.zeros(0, 6, requires_grad=True)).sum().backward()
    for name, parameter in layer.adapter.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name
        assert parameter.grad is None or parameter.grad.eq(0).all(), name


@pytest.mark.parametrize("preset", ["molora", "mole"])
def test_gates_train_over_adapters_that_stay(tiny_dense, folders, preset):
    """Any trained router may weigh trained adapters; the watch sees that it does, and that is all that moves."""
    model = tiny_dense()
    banks = {"one": BankConfig(preset, adapters=folders)}
    report = attach(model, banks, [])
    fill(model, banks)
    assert set(report.trainable) == {"bank routers"}
    assert sum(m.parameters for m in report.matches) == sum(report.trainable.values())
    # In both layers q_proj gives 32 numbers and v_proj 16; a gate sees those of three adapters, or the input's 32.
    each = {"molora": 2 * (3 * 32 + 3 * 32), "mole": 2 * (9 * 32 + 1 + 9 * 16 + 1)}
    assert sum(report.trainable.values()) == each[preset]
    before = {path: p.detach().clone() for path, p in model.named_parameters()}
    watch = AdapterWatch(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        with batch_context(BatchContext(shape=tuple(TOKENS.shape))):
            model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        watch.check()
        optimizer.step()
    assert watch.done
    moved = {path for path, p in model.named_parameters() if not torch.equal(p, before[path])}
    assert moved == {path for path in before if ".router." in path}


def test_a_presets_loss_can_be_turned_off(tiny_dense):
    for preset, more in {"mole": {"adapters": FOUR}, "moelora": {}}.items():
        attach(tiny_dense(), {"one": BankConfig(preset, balance="none", **more)}, [])


def test_gates_cut_off_from_the_output_are_named(tiny_dense, folders):
    model = tiny_dense()
    banks = {"one": BankConfig("mola", adapters=folders)}
    attach(model, banks, [])
    fill(model, banks)
    watch = AdapterWatch(model)
    broken = model.model.layers[0].self_attn.q_proj.adapter
    route = broken.router.forward
    broken.router.forward = lambda x: type(route(x))(*(t.detach() for t in vars(route(x)).values()))
    with batch_context(BatchContext(shape=tuple(TOKENS.shape))):
        model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    with pytest.raises(AdapterError, match=r"layers.0.self_attn.q_proj.adapter.router.weight\[0\]"):
        watch.check()


@pytest.mark.parametrize("preset", ["arrow", "mola"])
def test_an_adapter_that_was_not_loaded_is_not_a_number(tiny_dense, preset):
    model = tiny_dense()
    attach(model, {"one": BankConfig(preset, adapters=("a", "b", "c"))}, [])
    assert model(TOKENS).logits.isnan().all()


@pytest.mark.parametrize("preset", ["arrow", "mola", "mole"])
def test_a_saved_bank_needs_its_sources_no_more(tiny_dense, folders, tmp_path, preset):
    """Also what an export of a run writes: trained tensors, and those of the folders."""
    more = {} if preset == "mole" else {"top_k": 2}
    banks = {"one": BankConfig(preset, adapters=folders, **more)}
    model = tiny_dense().eval()
    attach(model, banks, [])
    fill(model, banks)
    assert collect_adapter(model).keys() >= frozen_tensors(banks).keys()
    save_adapter(tmp_path / "made", collect_adapter(model), banks, "base-1")
    gone = {"one": BankConfig(preset, adapters=("gone/one", "gone/two", "gone/three"), **more)}
    save_adapter(tmp_path / "moved", collect_adapter(model), gone, "base-1")
    for name in ("made", "moved"):
        fresh = tiny_dense().eval()
        apply_adapter(fresh, load_adapter(tmp_path / name), base_fingerprint="base-1")
        assert not any(p.requires_grad for path, p in fresh.named_parameters() if path.endswith((".A", ".B")))
        with torch.no_grad():
            assert torch.equal(fresh(TOKENS).logits, model(TOKENS).logits)


def test_arrow_is_made_without_a_model(tiny_dense, folders, tmp_path):
    tensors, bank, base = arrow_of(folders, 2, 0.7)
    assert (base, bank.r, set(bank.targets)) == ("base-1", 4, {"q_proj", "v_proj"})
    save_adapter(tmp_path / "arrow", tensors, {"arrow": bank}, base)
    model, same = tiny_dense().eval(), tiny_dense().eval()
    apply_adapter(model, load_adapter(tmp_path / "arrow"), base_fingerprint="base-1")
    attach(same, {"arrow": bank}, [])
    fill(same, {"arrow": bank}, "base-1")
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, same(TOKENS).logits)


def test_adapters_that_cannot_be_experts_are_named_with_what_to_do(tiny_dense, folders, tmp_path):
    def made(name, banks, base="base-1", std=0.3):
        model = tiny_dense()
        attach(model, banks, [])
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if path.endswith(".B"):
                    parameter.normal_(0, std)
        save_adapter(tmp_path / name, collect_adapter(model), banks, base)
        return str(tmp_path / name)

    def refused(match, *adapters, base="base-1", **more):
        bank = BankConfig("arrow", adapters=adapters, top_k=2, **more)
        model = tiny_dense()
        attach(model, {"one": bank}, [])
        with pytest.raises(AdapterError, match=match):
            fill(model, {"one": bank}, base)

    one = folders[0]
    refused("no adapter: it has no manifest.json", one, str(tmp_path / "none"))
    refused("trained on base base-2, this is base-1; give", one, made("other", {"a": BankConfig("lora")}, "base-2"))
    refused("weighs its experts by a router", one, made("routed", {"a": BankConfig("mola")}))
    refused("does not adapt model.layers.0.self_attn.v_proj", one, made("q", {"a": BankConfig("lora", ("q_proj",))}))
    refused("which is no target of adapter.one; add it", *folders, targets=("q_proj",))
    refused("none of its adapters adapts model.layers.0.self_attn.o_proj", *folders, targets=("q_proj", "[vo]_proj"))
    refused("r=3 is less than an adapter's rank 4; write r: 4", *folders, r=3)
    refused("is zero at model.layers.0.self_attn.q_proj", one, made("new", {"a": BankConfig("lora")}, std=0.0))
    mixed = made("ffn", {"a": BankConfig("mixlora", num_experts=2, r=2)})
    refused("runs a whole feed-forward block", one, mixed)
