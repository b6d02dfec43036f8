"""Banks of trained adapters: Arrow equals its formula, gates train and factors do not, files come back."""

from __future__ import annotations

import pytest
import torch

from lora.attach import attach
from lora.config import BankConfig
from lora.errors import AdapterError
from lora.format import apply_adapter, collect_adapter, load_adapter, save_adapter
from lora.trained import arrow_of, fill, frozen_tensors, principal_direction
from lora.watch import AdapterWatch
from moe.context import BatchContext, batch_context
from tests.lora.reference_arrow import arrow, direction

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


def test_gates_train_over_adapters_that_stay(tiny_dense, folders):
    """Any trained router may weigh trained adapters; the watch sees that it does, and that is all that moves."""
    model = tiny_dense()
    banks = {"one": BankConfig("molora", adapters=folders)}
    report = attach(model, banks, [])
    fill(model, banks)
    assert set(report.trainable) == {"bank routers"}
    assert sum(m.parameters for m in report.matches) == sum(report.trainable.values()) == 4 * 3 * 32
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


def test_an_adapter_that_was_not_loaded_is_not_a_number(tiny_dense):
    model = tiny_dense()
    attach(model, {"one": BankConfig("arrow", adapters=("a", "b", "c"))}, [])
    assert model(TOKENS).logits.isnan().all()


@pytest.mark.parametrize("preset", ["arrow", "mola"])
def test_a_saved_bank_needs_its_sources_no_more(tiny_dense, folders, tmp_path, preset):
    """Also what an export of a run writes: trained tensors, and those of the folders."""
    banks = {"one": BankConfig(preset, adapters=folders, top_k=2)}
    model = tiny_dense().eval()
    attach(model, banks, [])
    fill(model, banks)
    assert collect_adapter(model).keys() >= frozen_tensors(banks).keys()
    save_adapter(tmp_path / "made", collect_adapter(model), banks, "base-1")
    gone = {"one": BankConfig(preset, adapters=("gone/one", "gone/two", "gone/three"), top_k=2)}
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
