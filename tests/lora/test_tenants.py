"""Several adapters in one pass: each must be what it is alone, to the bit, whatever the others do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora.attach import attach
from lora.config import BankConfig
from lora.errors import AdapterError
from lora.factors import factored_delta
from lora.tenant_products import Factors, _stacked_deltas, add_deltas, frozen_products, groups_of
from lora.tenant_watch import TenantWatch
from lora.tenants import Tenant, attach_tenants, parameters_of
from moe.context import BatchContext, Slots, batch_context
from moe.convert import convert

BANKS = {
    "e": BankConfig("expert-lora", r=4, alpha=8.0),
    "a": BankConfig("lora", targets=("q_proj", "o_proj"), r=3, alpha=6.0),
}
DROPPED = {
    "e": BankConfig("expert-lora", r=4, alpha=8.0, dropout=0.3),
    "a": BankConfig("rslora", r=3, alpha=6.0, dropout=0.2),
}
TENANTS = [Tenant("x", 1), Tenant("y", 2), Tenant("z", 3)]
SEQUENCES = {"x": 2, "y": 1, "z": 3}


def built(tiny_moe, tenants=TENANTS, banks=BANKS, dtype=torch.float32):
    model = tiny_moe(dtype)
    attach_tenants(model, banks, tenants, convert(model))
    for tenant in tenants:
        randomize_b(parameters_of(model, tenant.name), tenant.seed)
    return model


@torch.no_grad()
def randomize_b(named, seed):
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in named:
        if path.endswith(".B"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def tokens(step=0):
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randint(64, (count, 16), generator=generator) for name, count in SEQUENCES.items()}


def context(ids, stream="step 0"):
    rows = tuple(i.numel() for i in ids)
    slot_T = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows))
    return BatchContext(slot_T=slot_T, slots=Slots(rows, (stream,) * len(rows)))


def losses_of(model, ids, **where):
    """Each tenant's loss; gradients are left on the parameters."""
    with batch_context(context(ids, **where)):
        logits = model(input_ids=torch.cat(ids), use_cache=False).logits
        parts = zip(logits.split([len(i) for i in ids]), ids, strict=True)
        losses = [model.loss_function(part, labels=i, vocab_size=64) for part, i in parts]
        torch.stack(losses).sum().backward()
    return [loss.detach() for loss in losses]


def trained(tiny_moe, tenants, banks=BANKS, steps=3, spoil=None):
    """Losses and factors of each tenant after some optimizer steps together."""
    model, found = built(tiny_moe, tenants, banks), []
    if spoil is not None:
        dict(parameters_of(model, spoil))["model.layers.0.self_attn.q_proj.adapter.B"].data.fill_(torch.nan)
    groups = [{"params": [p for _, p in parameters_of(model, tenant.name)]} for tenant in tenants]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    for step in range(steps):
        everyone = tokens(step)
        found.append(losses_of(model, [everyone[tenant.name] for tenant in tenants], stream=f"step {step}"))
        optimizer.step()
        optimizer.zero_grad()
    factors = {t.name: {path: p.detach() for path, p in parameters_of(model, t.name)} for t in tenants}
    return {t.name: [losses[i] for losses in found] for i, t in enumerate(tenants)}, factors


def assert_same(mine, theirs):
    assert mine.keys() == theirs.keys()
    for path, want in theirs.items():
        assert torch.equal(mine[path], want), path


@pytest.mark.parametrize("banks", [BANKS, DROPPED], ids=["plain", "dropout"])
def test_each_tenant_trains_to_the_bits_of_training_alone(tiny_moe, banks):
    losses, together = trained(tiny_moe, TENANTS, banks)
    for tenant in TENANTS:
        own_losses, own = trained(tiny_moe, [tenant], banks)
        assert own_losses[tenant.name] == losses[tenant.name]
        assert_same(together[tenant.name], own[tenant.name])


def test_a_tenant_of_nans_changes_no_bit_of_the_others(tiny_moe):
    _, healthy = trained(tiny_moe, TENANTS)
    losses, spoiled = trained(tiny_moe, TENANTS, spoil="y")
    assert all(loss.isnan() for loss in losses["y"])
    for name in ("x", "z"):
        assert_same(spoiled[name], healthy[name])


def test_dropout_differs_between_steps_and_tenants_and_is_off_in_evaluation(tiny_moe):
    model = built(tiny_moe, TENANTS, DROPPED)
    same = torch.arange(16)[None]
    first, second = losses_of(model, [same] * 3), losses_of(model, [same] * 3, stream="step 1")
    assert all(a != b for a, b in zip(first, second, strict=True))
    model.eval()
    assert losses_of(model, [same] * 3) == losses_of(model, [same] * 3, stream="step 1")


def test_tenants_are_what_the_ordinary_adapter_is_in_fp64(tiny_moe):
    """Against lora.attach's own path, which shares nothing with this one but the start: outputs and all gradients."""
    model, everyone = built(tiny_moe, dtype=torch.float64), tokens()
    losses = losses_of(model, list(everyone.values()))
    for tenant, loss in zip(TENANTS, losses, strict=True):
        alone = tiny_moe(torch.float64)
        attach(alone, BANKS, convert(alone), seed=tenant.seed)
        named = {path: p for path, p in alone.named_parameters() if p.requires_grad}
        mine = dict(parameters_of(model, tenant.name))
        assert mine.keys() == named.keys()
        for path in named:
            if path.endswith(".A"):
                assert torch.equal(mine[path], named[path]), path
            else:
                assert not named[path].any()
                named[path].data.copy_(mine[path].data)
        ids = everyone[tenant.name]
        want = alone(input_ids=ids, labels=ids, use_cache=False).loss
        want.backward()
        torch.testing.assert_close(loss, want.detach(), rtol=1e-12, atol=0)
        for path, parameter in named.items():
            torch.testing.assert_close(mine[path].grad, parameter.grad, rtol=1e-9, atol=1e-12)


def test_a_recomputed_layer_draws_the_same_masks(tiny_moe):
    plain, again = built(tiny_moe, TENANTS, DROPPED), built(tiny_moe, TENANTS, DROPPED)
    again.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again.enable_input_require_grads()
    ids = list(tokens().values())
    assert losses_of(plain, ids) == losses_of(again, ids)
    for (path, one), other in zip(plain.named_parameters(), again.parameters(), strict=True):
        if one.requires_grad:
            assert torch.equal(one.grad, other.grad), path


def test_a_tenant_without_rows_gets_gradients_of_zero(tiny_moe):
    model = built(tiny_moe)
    ids = tokens()
    with batch_context(context([ids["x"], ids["y"][:0], ids["z"]])):
        model(input_ids=torch.cat([ids["x"], ids["z"]]), use_cache=False).logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for _, p in parameters_of(model, "y"))
    assert all(p.grad.any() for _, p in parameters_of(model, "x"))


@pytest.mark.parametrize(
    ("bank", "words"),
    [
        (BankConfig("mola"), "router token"),
        (BankConfig("mixlora"), "site ffn"),
        (BankConfig("moslora"), "mixer True"),
        (BankConfig("expert-lora-shared"), "share all"),
    ],
)
def test_banks_that_tenants_cannot_have_are_refused_by_name(tiny_moe, bank, words):
    model = tiny_moe()
    with pytest.raises(AdapterError, match=rf"adapter\.b: tenants cannot have preset .*{words}"):
        attach_tenants(model, {"b": bank}, TENANTS, convert(model))


def test_a_batch_that_does_not_say_whose_its_rows_are_is_refused(tiny_moe):
    with pytest.raises(AdapterError, match="does not say whose its rows are"):
        built(tiny_moe)(input_ids=tokens()["x"])


def test_the_watch_names_a_tenant_whose_adapter_is_cut_off(tiny_moe):
    model = built(tiny_moe)
    watch = TenantWatch(model, [tenant.name for tenant in TENANTS])
    adapter = model.model.layers[1].self_attn.o_proj.adapter
    adapter.get_submodule("tenant-y").scale = 0.0
    losses_of(model, list(tokens().values()))
    with pytest.raises(AdapterError, match=r"layers\.1\.self_attn\.o_proj\.adapter\.B of tenant y, and 0 others"):
        watch.check({"x", "y", "z"})


def test_the_watch_asks_all_ranks_before_it_says_so(tiny_moe):
    """A rank whose share of a tenant gives no gradient is no reason to stop while another's does."""
    ids, watches = tokens(), []
    for rows in (ids["y"][:0], ids["y"]):
        model = built(tiny_moe)
        watches.append(TenantWatch(model, [tenant.name for tenant in TENANTS]))
        with batch_context(context([ids["x"], rows, ids["z"]])):
            model(input_ids=torch.cat([ids["x"], rows, ids["z"]]), use_cache=False).logits.sum().backward()
    found = []
    watches[1].check({"x", "y", "z"}, lambda flags: found.append(flags) or flags)
    watches[0].check({"x", "y", "z"}, lambda flags: flags + found[0])


@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=4), st.integers(0, 99))
def test_products_by_group_are_those_of_one_row_at_a_time(counts_LA, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    local, rows = len(counts_LA), sum(map(sum, counts_LA))
    x_NM, weight = draw(rows, 5), draw(local, 7, 5)
    ranks, scales = (1, 2, 4), (0.5, 2.0, 1.5)
    tenants = [Factors(draw(local, r, 5), draw(local, 7, r), s) for r, s in zip(ranks, scales, strict=True)]
    leaves = [x_NM.requires_grad_(), *(f.requires_grad_() for t in tenants for f in (t.a_LRM, t.b_LOR))]
    groups, counts = groups_of(counts_LA), torch.tensor(counts_LA)
    got = add_deltas(frozen_products(x_NM, weight, counts, groups), x_NM, tenants, counts, groups)
    want, n = [], 0
    for expert, counts_A in enumerate(counts_LA):
        for tenant, count in zip(tenants, counts_A, strict=True):
            for _ in range(count):
                whole = weight[expert] + tenant.scale * tenant.b_LOR[expert] @ tenant.a_LRM[expert]
                want.append(whole @ x_NM[n])
                n += 1
    want_NO = torch.stack(want) if want else got.new_zeros(0, 7)
    torch.testing.assert_close(got, want_NO)
    out = draw(rows, 7)
    mine = torch.autograd.grad((got * out).sum(), leaves)
    theirs = torch.autograd.grad((want_NO * out).sum(), leaves, allow_unused=True) if want else [None] * len(leaves)
    for a, b, leaf in zip(mine, theirs, leaves, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(leaf) if b is None else b)


def test_a_grouped_product_over_tenants_rounds_as_that_of_one_adapter():
    """In bf16, whatever computes it: here on a CPU, where the same product goes expert by expert."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).bfloat16()

    counts_LA, scale = torch.tensor([[5, 8], [4, 0], [6, 7]]), 1.7
    tenants = [Factors(draw(3, 4, 16), draw(3, 24, 4), scale) for _ in range(2)]
    x_NM = draw(int(counts_LA.sum()), 16)
    slot_N = torch.tensor([0, 1]).repeat(3).repeat_interleave(counts_LA.flatten())
    together = _stacked_deltas(x_NM, tenants, counts_LA)
    for slot, own in enumerate(tenants):
        alone = factored_delta(x_NM[slot_N == slot], own.a_LRM, own.b_LOR, counts_LA[:, slot], scale)
        assert torch.equal(together[slot_N == slot], alone)


@pytest.mark.gpu
def test_on_a_gpu_each_tenant_is_what_it_is_alone(tiny_moe):
    ids = {name: i.cuda() for name, i in tokens().items()}
    model = built(tiny_moe, dtype=torch.bfloat16).cuda()
    together = losses_of_on_gpu(model, list(ids.values()))
    for tenant, loss in zip(TENANTS, together, strict=True):
        alone = built(tiny_moe, [tenant], dtype=torch.bfloat16).cuda()
        (want,) = losses_of_on_gpu(alone, [ids[tenant.name]])
        torch.testing.assert_close(loss, want, rtol=1e-2, atol=0)
        mine = dict(parameters_of(model, tenant.name))
        for path, parameter in parameters_of(alone, tenant.name):
            error = (mine[path].grad - parameter.grad).float().norm()
            assert error < 0.05 * parameter.grad.float().norm(), path


def losses_of_on_gpu(model, ids):
    here = context(ids)
    there = BatchContext(slot_T=here.slot_T.cuda(), slots=here.slots)
    with batch_context(there):
        logits = model(input_ids=torch.cat(ids), use_cache=False).logits
        parts = zip(logits.split([len(i) for i in ids]), ids, strict=True)
        losses = [model.loss_function(part, labels=i, vocab_size=64) for part, i in parts]
        torch.stack(losses).sum().backward()
    return [loss.detach() for loss in losses]
