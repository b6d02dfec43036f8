"""MixLoRA written as a mixture of experts: against its paper's formula, one token at a time.

Shapes: T tokens, H hidden, I intermediate, E experts, R rank.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from lora.config import BankConfig
from lora.errors import AdapterError
from lora.format import apply_adapter, collect_adapter, load_adapter, save_adapter
from lora.upcycled import write_upcycled
from moe.folder import read_tensors
from moe.load import FolderError

HIDDEN, INTER, EXPERTS, R, ALPHA, LAYERS = 32, 24, 5, 3, 4.0, 2
TOKENS = torch.arange(36).view(3, 12)
MIX = BankConfig("mixlora", num_experts=EXPERTS, top_k=2, r=R, alpha=ALPHA)
BANKS = {"f": MIX, "a": BankConfig("lora", ("q_proj",), r=2, alpha=3.0)}


def dense(folder, family="llama", dtype=torch.float32, **fields):
    config = AutoConfig.for_model(
        family, vocab_size=64, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, intermediate_size=INTER, max_position_embeddings=64,
        initializer_range=0.2, bos_token_id=None, eos_token_id=None, **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    return folder


def tensors(layers=LAYERS, experts=EXPERTS):
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    found = {}
    for layer in range(layers):
        place = f"model.layers.{layer}.mlp.adapter"
        for name, (out, into) in {"gate": (INTER, HIDDEN), "up": (INTER, HIDDEN), "down": (HIDDEN, INTER)}.items():
            found[f"{place}.{name}_proj.A"] = drawn(experts, R, into)
            found[f"{place}.{name}_proj.B"] = drawn(experts, out, R)
        found[f"{place}.router.weight"] = drawn(experts, HIDDEN)
        found[f"model.layers.{layer}.self_attn.q_proj.adapter.A"] = drawn(1, 2, HIDDEN)
        found[f"model.layers.{layer}.self_attn.q_proj.adapter.B"] = drawn(1, 32, 2)
    return found


def naive(folder, found, top_k=2, renormalise=True):
    """Logits of the adapted dense model, in fp64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    wide = {path: tensor.double() for path, tensor in found.items()}
    for layer, block in enumerate(model.model.layers):
        place = f"model.layers.{layer}.self_attn.q_proj.adapter"
        block.self_attn.q_proj.weight.data += 3.0 / 2 * wide[f"{place}.B"][0] @ wide[f"{place}.A"][0]
        block.mlp.forward = _mixed(block.mlp, wide, f"model.layers.{layer}.mlp.adapter", top_k, renormalise)
    with torch.no_grad():
        return model(TOKENS).logits


def _mixed(mlp, wide, place, top_k, renormalise):
    def weight(name, e):
        a, b = wide[f"{place}.{name}.A"][e], wide[f"{place}.{name}.B"][e]
        return getattr(mlp, name).weight + ALPHA / R * b @ a

    def forward(x):
        y = torch.zeros_like(x)
        for row in range(x.shape[0]):
            for at in range(x.shape[1]):
                token = x[row, at]
                p = (wide[f"{place}.router.weight"] @ token).softmax(-1)
                best = p.argsort(descending=True)[:top_k]
                total = p[best].sum() if renormalise else 1.0
                for e in best.tolist():
                    inner = functional.silu(weight("gate_proj", e) @ token) * (weight("up_proj", e) @ token)
                    y[row, at] += p[e] / total * (weight("down_proj", e) @ inner)
        return y

    return forward


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "mixtral"), ("mistral", "mixtral"), ("qwen3", "qwen3_moe"), ("qwen2", "qwen2_moe")]
)
def test_the_mixture_computes_what_mixlora_does(tmp_path, family, kind):
    base, found = dense(tmp_path / "dense", family), tensors()
    save_adapter(tmp_path / "adapter", found, BANKS, "base")
    config, _ = write_upcycled(load_adapter(tmp_path / "adapter").tensors, BANKS, base, tmp_path / "moe")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (config.model_type, model.config.model_type, config.num_experts_per_tok) == (kind, kind, 2)
    with torch.no_grad():
        got = model.eval()(TOKENS).logits.double()
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval()(TOKENS).logits
    want = naive(base, found)
    assert (want - plain).norm() / want.norm() > 0.1
    assert (got - want).norm() / want.norm() < 2e-6


def test_what_the_training_module_saves_becomes_the_same_mixture(adapted, tiny_dense, tmp_path):
    """From attach to a folder that transformers loads, with the adapter folder in between."""
    tiny_dense().save_pretrained(tmp_path / "dense")
    ours = adapted(tiny_dense(), BANKS)
    save_adapter(tmp_path / "adapter", collect_adapter(ours), BANKS, "base", base_model=str(tmp_path / "dense"))
    adapter = load_adapter(tmp_path / "adapter")
    again = tiny_dense().eval()
    apply_adapter(again, adapter)
    write_upcycled(adapter.tensors, adapter.banks, tmp_path / "dense", tmp_path / "moe")
    mixture = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32).eval()
    with torch.no_grad():
        want, same, got = (model(TOKENS).logits for model in (ours, again, mixture))
        plain = tiny_dense().eval()(TOKENS).logits
    assert torch.equal(same, want)
    assert (want - plain).norm() / want.norm() > 0.1
    assert (got - want).norm() / want.norm() < 2e-6


def test_weights_that_do_not_sum_to_one_are_kept_where_the_family_can(tmp_path):
    banks = {"f": BankConfig("mixlora", num_experts=EXPERTS, top_k=3, r=R, alpha=ALPHA, renormalise=False)} | {
        "a": BANKS["a"]
    }
    base, found = dense(tmp_path / "dense", "qwen3"), tensors()
    config, _ = write_upcycled(found, banks, base, tmp_path / "moe")
    assert config.norm_topk_prob is False
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32).eval()(TOKENS).logits
    want = naive(base, found, 3, renormalise=False)
    assert (got.double() - want).norm() / want.norm() < 2e-6
    with pytest.raises(AdapterError, match="renormalise: false, and mixtral"):
        write_upcycled(found, banks, dense(tmp_path / "llama"), tmp_path / "never")


def test_in_bf16_each_weight_is_rounded_once(tmp_path):
    base, found = dense(tmp_path / "dense", dtype=torch.bfloat16), tensors()
    _, losses = write_upcycled(found, BANKS, base, tmp_path / "moe")
    before, after = dict(read_tensors(base)), dict(read_tensors(tmp_path / "moe"))
    place = "model.layers.1.mlp.adapter.down_proj"
    exact = before["model.layers.1.mlp.down_proj.weight"].float()
    exact += (found[f"{place}.B"][4] @ found[f"{place}.A"][4]) * (ALPHA / R)
    assert torch.equal(after["model.layers.1.block_sparse_moe.experts.4.w2.weight"], exact.bfloat16())
    router = found["model.layers.1.mlp.adapter.router.weight"]
    assert torch.equal(after["model.layers.1.block_sparse_moe.gate.weight"], router.bfloat16())
    assert losses.keys() == {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "q_proj", "router"}
    assert all(0 < loss.share < 0.1 for loss in losses.values())


@pytest.mark.parametrize(
    ("banks", "layers", "message"),
    [
        ({"f": BankConfig("mixlora-dynamic", num_experts=EXPERTS, r=R)}, 2, "router: token and combine: top_p"),
        ({"f": BankConfig("mixlora-switch", num_experts=EXPERTS, r=R)}, 2, "router: token and combine: switch"),
        ({"f": BankConfig("mixlora", num_experts=(4, 8), r=R)}, 2, "another number of experts in some layers"),
        ({"a": BankConfig("lora")}, 2, "exactly one bank on feed-forward blocks"),
        ({"f": MIX, "m": BankConfig("mola")}, 2, r"adapter\.m \(mola\) weighs its experts"),
        ({"f": MIX, "e": BankConfig("expert-lora")}, 2, "the base of an upcycled model has none"),
        (BANKS, 1, "is on 1 of 2 feed-forward blocks"),
    ],
    ids=["dynamic", "switch", "by layer", "lora", "mola", "experts", "one layer"],
)
def test_what_no_mixture_computes_is_refused(tmp_path, banks, layers, message):
    base = dense(tmp_path / "dense")
    with pytest.raises(AdapterError, match=message):
        write_upcycled(tensors(layers), banks, base, tmp_path / "moe")
    assert os.listdir(tmp_path) == ["dense"]


def test_bases_and_folders_that_do_not_fit_are_refused(tmp_path):
    base, found = dense(tmp_path / "dense"), tensors()
    for changed, message in [
        ({"model.layers.0.mlp.adapter.up_proj.B": torch.ones(EXPERTS, 7, R)}, r"up_proj\.weight has shape"),
        ({"model.layers.0.self_attn.q_proj.adapter.A": torch.ones(1, 2, 5)}, r"q_proj\.weight has shape"),
    ]:
        with pytest.raises(AdapterError, match=message):
            write_upcycled(found | changed, BANKS, base, tmp_path / "moe")
    without = {path: tensor for path, tensor in found.items() if "router" not in path}
    with pytest.raises(AdapterError, match=r"looked for one router \[E, H\], found none"):
        write_upcycled(without, BANKS, base, tmp_path / "moe")
    with pytest.raises(FolderError, match="exists"):
        write_upcycled(found, BANKS, base, base)
    with pytest.raises(AdapterError, match=r"has no config\.json"):
        write_upcycled(found, BANKS, tmp_path, tmp_path / "moe")
    with pytest.raises(AdapterError, match=r"phi3.*cannot be upcycled"):
        write_upcycled(found, BANKS, dense(tmp_path / "other", "phi3", pad_token_id=0), tmp_path / "moe")
    assert sorted(os.listdir(tmp_path)) == ["dense", "other"]
