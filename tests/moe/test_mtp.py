"""Multi-token prediction against the formulas written out, position by position."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from moe.convert import convert
from moe.mtp import PREFIX, attach_mtp
from moe.refs import TensorAddress

WEIGHT = 0.3


def build(tiny_model, depth=2, dtype=torch.float64):
    model = tiny_model().to(dtype)
    blocks = convert(model)
    blocks += attach_mtp(model, depth, WEIGHT, seed=3)
    return model, blocks


def batch():
    return torch.randint(0, 64, (2, 10), generator=torch.Generator().manual_seed(4))


def naive_losses(model, ids_BS, labels_BS):
    """One sequence and one depth at a time, over the positions that the paper has: 1..T-k."""
    sums, counts = [0.0] * len(model.mtp), [0] * len(model.mtp)
    for ids_S, labels_S in zip(ids_BS, labels_BS, strict=True):
        h_SH = model.model(input_ids=ids_S[None], use_cache=False).last_hidden_state[0]
        for k, module in enumerate(model.mtp.values(), 1):
            length = len(ids_S) - k
            joined = []
            for i in range(length):
                state, token = h_SH[i], model.model.embed_tokens.weight[ids_S[i + k]]
                joined.append(torch.cat([rms(state, module.state_norm), rms(token, module.embedding_norm)]))
            x_SH = torch.stack(joined) @ module.projection.weight.T
            positions = torch.arange(length)[None]
            cos_sin = model.model.rotary_emb(x_SH[None], positions)
            h_SH = module.block(x_SH[None], position_embeddings=cos_sin, attention_mask=None)[0]
            for i in range(length - 1):
                if labels_S[i + k + 1] != -100:
                    logits_V = rms(h_SH[i], module.norm) @ model.lm_head.weight.T
                    sums[k - 1] = sums[k - 1] + F.cross_entropy(logits_V, labels_S[i + k + 1])
                    counts[k - 1] += 1
    return [total / count for total, count in zip(sums, counts, strict=True)]


def rms(x_H, norm):
    return x_H * torch.rsqrt(x_H.pow(2).mean() + norm.eps) * norm.weight


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_loss_and_gradients_equal_the_formulas_of_the_paper(tiny_model):
    model, _ = build(tiny_model)
    ids_BS = batch()
    labels_BS = ids_BS.clone()
    labels_BS[1, 6:8] = -100
    model.train()
    got = model(input_ids=ids_BS, labels=labels_BS, use_cache=False).loss
    got.backward()
    found = gradients(model)

    model.zero_grad()
    model.eval()
    plain = model(input_ids=ids_BS, labels=labels_BS, use_cache=False).loss
    losses = naive_losses(model, ids_BS, labels_BS)
    want = plain + WEIGHT / 2 * sum(losses)
    want.backward()
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-6, atol=0)  # the cross-entropies are fp32
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_padding_is_neither_predicted_nor_predicted_from(tiny_model):
    model, _ = build(tiny_model)
    model.train()
    ids_BS = batch()[:1]
    short = model(input_ids=ids_BS[:, :7], labels=ids_BS[:, :7], use_cache=False).loss
    mask_BS = (torch.arange(10) < 7)[None].long()
    labels_BS = ids_BS.masked_fill(mask_BS == 0, -100)
    padded = model(input_ids=ids_BS, attention_mask=mask_BS, labels=labels_BS, use_cache=False).loss
    torch.testing.assert_close(padded, short, rtol=1e-6, atol=0)


def test_evaluation_is_left_alone_and_the_model_predicts_as_before(tiny_model):
    model, _ = build(tiny_model, dtype=torch.float32)
    plain = tiny_model()
    convert(plain)
    ids_BS = batch()
    with torch.no_grad():
        got, want = (m.eval()(input_ids=ids_BS, labels=ids_BS, use_cache=False) for m in (model, plain))
        assert torch.equal(got.loss, want.loss)
        assert torch.equal(model.train()(input_ids=ids_BS, use_cache=False).logits, want.logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit_of_a_gradient(tiny_model, reentrant):
    model, _ = build(tiny_model, dtype=torch.float32)
    other = copy.deepcopy(tiny_model())
    convert(other)
    attach_mtp(other, 2, WEIGHT, seed=3)
    other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    ran = []
    other.mtp["2"].block.mlp.register_forward_pre_hook(lambda *_: ran.append(1))
    losses = []
    for one in (model, other):
        one.train()
        losses.append(one(input_ids=batch(), labels=batch(), use_cache=False).loss)
        losses[-1].backward()
    assert len(ran) == 2, "the module's block was not recomputed"
    assert torch.equal(*losses)
    expected = gradients(model)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(other).items())


def test_names_layers_and_addresses_follow_the_model(tiny_model):
    model, blocks = build(tiny_model, dtype=torch.float32)
    assert [block.layer for block in blocks] == [0, 1, 2, 3]
    addresses = {name: p.address for name, p in model.named_parameters()}
    assert all(address.param == name for name, address in addresses.items())
    experts = addresses["mtp.3.block.mlp.experts.down_proj"]
    assert experts == TensorAddress("mtp.3.block.mlp.experts.down_proj", (8, 32, 16), 3, "down_proj", 0, 8)
    units = [span.unit for address in addresses.values() for span in address.units()]
    assert len(units) == len(set(units))
    plain = set(dict(tiny_model().named_parameters()))
    assert {name for name in addresses if not name.startswith(PREFIX)} == plain


def test_the_seed_alone_decides_weights_that_are_initialised(tiny_model):
    made = [build(tiny_model, dtype=torch.float32)[0] for _ in range(2)]
    for (name, a), b in zip(made[0].mtp.named_parameters(), made[1].mtp.parameters(), strict=True):
        assert torch.equal(a, b), name
        if a.dim() > 1:
            assert float(a.detach().std()) == pytest.approx(0.02, rel=0.2), name
        else:
            assert torch.equal(a, torch.ones_like(a)), name
    assert not torch.equal(made[0].mtp["2"].projection.weight, made[0].mtp["3"].projection.weight)


def test_a_dense_last_layer_gives_dense_modules():
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, intermediate_size=24,
        mlp_only_layers=[1],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    blocks = convert(model)
    assert attach_mtp(model, 1, WEIGHT, seed=0) == []
    assert model.mtp["2"].block.mlp.gate_proj.weight.shape == (24, 32)
    model.train()(input_ids=batch(), labels=batch(), use_cache=False).loss.backward()
    assert all(p.grad is not None for p in model.mtp.parameters())
    assert len(blocks) == 1
