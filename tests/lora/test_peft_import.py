"""What PEFT saved, of all versions whose layouts differ, as our adapters; and what is refused."""

from __future__ import annotations

import json
import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from lora.base_facts import BaseFacts
from lora.errors import AdapterError
from lora.format import apply_adapter, load_adapter
from lora.peft_format import pack_a, pack_b, write_peft
from lora.peft_import import import_adapter

TOKENS = torch.arange(48).view(4, 12)
HIDDEN, INTER, EXPERTS, R = 32, 16, 8, 3
# out, in; the first is square in ``base_folder``
SHAPES = {"gate_up_proj": (2 * INTER, HIDDEN), "down_proj": (HIDDEN, INTER)}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
BY_LAYER = {"rank_pattern": {"layers.1.*": 2}, "alpha_pattern": {"layers.1.*": 4}}
pytestmark = pytest.mark.filterwarnings("ignore:.*rank_pattern", "ignore:.*alpha_pattern", "ignore:.*base model")


@pytest.fixture(scope="module")
def oblong_folder(tmp_path_factory):
    """A base none of whose tensors is square: 2I = 48, H = 32."""
    config = Qwen3MoeConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        moe_intermediate_size=24, num_experts=8, num_experts_per_tok=2, vocab_size=64, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "oblong"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def base_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def ours(adapter, base):
    model = base_of(base)
    apply_adapter(model, load_adapter(adapter))
    return logits(model)


@pytest.mark.parametrize(
    "options",
    [
        {"target_parameters": BOTH, "target_modules": ["q_proj", "o_proj"]},
        {"target_parameters": BOTH[::-1], "target_modules": []},
        {"target_parameters": BOTH[:1], "target_modules": []},
        {"target_parameters": BOTH[1:], "target_modules": []},
        {"target_modules": ["k_proj"]},
        {"target_parameters": BOTH, "target_modules": ["q_proj"], "use_rslora": True},
        {
            "target_parameters": BOTH,
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 6},
            "alpha_pattern": {"down_proj": 5, ".*v_proj": 1},
        },
        {"target_parameters": BOTH, "target_modules": [], "rank_pattern": {"layers.1.*": 2}},
        {"target_parameters": BOTH, "target_modules": [], **BY_LAYER},
    ],
    ids=["experts and attention", "named in reverse", "gate_up", "down", "attention", "rslora", "patterns",
         "ranks by layer", "one scale by layer"],
)  # fmt: skip
def test_what_peft_saved_gives_its_logits(oblong_folder, tmp_path, options):
    options = {"r": 4, "lora_alpha": 8} | options
    theirs = get_peft_model(base_of(oblong_folder), LoraConfig(**options))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.2, generator=generator)
    theirs.save_pretrained(tmp_path / "peft")
    want, base = logits(theirs), logits(base_of(oblong_folder))
    assert (want - base).norm() / base.norm() > 0.05
    import_adapter(tmp_path / "peft", tmp_path / "native", oblong_folder)
    assert (ours(tmp_path / "native", oblong_folder) - want).norm() / want.norm() < 1e-5


def write(folder, tensors, **fields):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"base_model.model.{key}": tensor.contiguous() for key, tensor in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    config = {"peft_type": "LORA", "r": R, "lora_alpha": 6, "target_parameters": BOTH, "peft_version": "0.21.0"}
    content = {key: value for key, value in (config | fields).items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def factors(layers=2):
    """Random A [E,R,in] and B [E,out,R] of ``base_folder``'s experts, by layer and tensor."""
    generator = torch.Generator().manual_seed(2)

    def drawn(*shape):
        return torch.randn(shape, generator=generator) * 0.2

    return {
        (layer, name): (drawn(EXPERTS, R, inputs), drawn(EXPERTS, outputs, R))
        for layer in range(layers)
        for name, (outputs, inputs) in SHAPES.items()
    }


def fused(pairs, turned=False, b_slowest=False):
    """PEFT's keys. ``turned``: as PEFT 0.17 and 0.18 wrote [E, out, in], with the outputs for inputs."""
    found = {}
    for (layer, name), (a, b) in pairs.items():
        key = f"model.layers.{layer}.mlp.experts" + (".base_layer" if name == "gate_up_proj" else "")
        if turned:
            a, b = b.transpose(1, 2), a.transpose(1, 2)
        found[f"{key}.lora_A.weight"] = pack_a(a)
        found[f"{key}.lora_B.weight"] = torch.cat(list(b), 1) if b_slowest else pack_b(b)
    return found


def test_layers_with_scales_of_their_own_and_layers_without_an_adapter(base_folder, tmp_path):
    pairs = {key: pair for key, pair in factors().items() if key != (0, "down_proj")}
    tensors = {k.replace("0.mlp.experts.base_layer", "0.mlp.experts"): t for k, t in fused(pairs).items()}
    names = ["layers.0.mlp.experts.gate_up_proj", "layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"]
    write(tmp_path / "peft", tensors, alpha_pattern={"layers.1.*": 4}, target_parameters=names)
    banks = import_adapter(tmp_path / "peft", tmp_path / "native", base_folder)
    assert {(len(bank.targets), bank.alpha) for bank in banks.values()} == {(1, 6), (2, 4)}
    check(tmp_path / "native", pairs)
    adapter = load_adapter(tmp_path / "native")
    write_peft(adapter.tensors, adapter.banks, tmp_path / "again", BaseFacts.read(base_folder))
    theirs = PeftModel.from_pretrained(base_of(base_folder), tmp_path / "again")
    assert sum(".lora_A." in name for name, _ in theirs.named_parameters()) == 3
    want = ours(tmp_path / "native", base_folder)
    assert (logits(theirs) - want).norm() / want.norm() < 1e-5


def test_a_tensor_in_both_layouts_is_refused(base_folder, tmp_path):
    write(tmp_path / "peft", fused(factors()) | apart(factors(), same_a=True))
    with pytest.raises(AdapterError, match="is adapted twice"):
        import_adapter(tmp_path / "peft", tmp_path / "native", base_folder)


def check(adapter, pairs):
    found = load_adapter(adapter).tensors
    for (layer, name), (a, b) in pairs.items():
        place = f"model.layers.{layer}.mlp.experts.adapter.{name}"
        assert torch.equal(found[f"{place}.A"], a)
        assert torch.equal(found[f"{place}.B"], b)
    assert len(found) == 2 * len(pairs)


@pytest.mark.parametrize(
    ("version", "turned"), [("0.17.1", True), ("0.18.0", True), ("0.19.0", False), ("0.21.2", False)]
)
def test_versions_that_disagree_on_the_axes_are_told_apart(base_folder, tmp_path, version, turned):
    pairs = factors()
    write(tmp_path / "peft", fused(pairs, turned), peft_version=version)
    import_adapter(tmp_path / "peft", tmp_path / "native", base_folder)
    check(tmp_path / "native", pairs)


def test_square_experts_without_a_version_are_refused(base_folder, tmp_path):
    write(tmp_path / "peft", fused(factors()), peft_version=None)
    with pytest.raises(AdapterError, match=r"gate_up_proj has as many inputs as outputs.*no peft_version"):
        import_adapter(tmp_path / "peft", tmp_path / "native", base_folder)
    assert os.listdir(tmp_path) == ["peft"]
    with pytest.raises(AdapterError, match="'new' is no version of PEFT"):
        import_adapter(tmp_path / "peft", tmp_path / "native", base_folder, peft_version="new")
    import_adapter(tmp_path / "peft", tmp_path / "native", base_folder, peft_version="0.20")
    check(tmp_path / "native", factors())
    write(tmp_path / "told", fused(factors()), peft_version="0.21.2")
    with pytest.raises(AdapterError, match=r"says peft_version '0\.21\.2'; leave out"):
        import_adapter(tmp_path / "told", tmp_path / "never", base_folder, peft_version="0.17")


@pytest.mark.parametrize("turned", [False, True])
def test_shapes_tell_where_they_can_and_no_version_does(base_folder, tmp_path, turned):
    pairs = {key: pair for key, pair in factors().items() if key[1] == "down_proj"}
    write(tmp_path / "peft", fused(pairs, turned), peft_version=None, target_parameters=BOTH[1:])
    import_adapter(tmp_path / "peft", tmp_path / "native", base_folder)
    check(tmp_path / "native", pairs)


def test_unsloths_packing_of_b_is_read_when_asked_for(base_folder, tmp_path):
    pairs = factors()
    write(tmp_path / "peft", fused(pairs, b_slowest=True))
    import_adapter(tmp_path / "peft", tmp_path / "native", base_folder, expert_slowest=True)
    check(tmp_path / "native", pairs)
    write(tmp_path / "apart", apart(pairs, same_a=True))
    with pytest.raises(AdapterError, match="has no stacked experts"):
        import_adapter(tmp_path / "apart", tmp_path / "never", base_folder, expert_slowest=True)


def apart(pairs, same_a):
    """Each expert's matrices, gate and up with factors of their own or one A."""
    found = {}
    for (layer, name), (a, b) in pairs.items():
        halves = ("gate_proj", "up_proj") if name == "gate_up_proj" else ("down_proj",)
        for e in range(EXPERTS):
            for number, (half, rows) in enumerate(zip(halves, b[e].chunk(len(halves)), strict=True)):
                place = f"model.layers.{layer}.mlp.experts.{e}.{half}"
                found[f"{place}.lora_A.weight"] = a[e] if same_a else a[e] + number
                found[f"{place}.lora_B.weight"] = rows
    return {key: tensor.clone() for key, tensor in found.items()}


def test_gate_and_up_apart_become_one_of_the_same_rank_where_they_share_a(base_folder, tmp_path):
    pairs = factors()
    write(tmp_path / "peft", apart(pairs, same_a=True), target_modules=["gate_proj", "up_proj", "down_proj"])
    import_adapter(tmp_path / "peft", tmp_path / "native", base_folder)
    check(tmp_path / "native", pairs)


def test_gate_and_up_with_factors_of_their_own_become_block_diagonal(base_folder, tmp_path):
    pairs = factors()
    write(tmp_path / "peft", apart(pairs, same_a=False), target_modules=["gate_proj", "up_proj", "down_proj"])
    banks = import_adapter(tmp_path / "peft", tmp_path / "native", base_folder)
    assert {(bank.targets, bank.r, bank.alpha) for bank in banks.values()} == {
        (("mlp.experts.gate_up_proj",), 2 * R, 12), (("mlp.experts.down_proj",), R, 6)
    }  # fmt: skip
    found, (a, b) = load_adapter(tmp_path / "native").tensors, pairs[1, "gate_up_proj"]
    place = "model.layers.1.mlp.experts.adapter.gate_up_proj"
    for e in range(EXPERTS):
        want = torch.cat([b[e, :INTER] @ a[e], b[e, INTER:] @ (a[e] + 1)])
        got = found[f"{place}.B"][e] @ found[f"{place}.A"][e]
        torch.testing.assert_close(got, want)


LINEAR = {
    "model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(R, 32),
    "model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(32, R),
}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'; only LORA"),
        ({"use_dora": True}, r"use_dora=True \(DoRA\) has no equal"),
        ({"bias": "all"}, "bias='all' trains biases"),
        ({"lora_bias": True}, "lora_bias=True has no equal"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] \(fully trained modules\)"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True has no equal"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices=\[3\] \(trained tokens\)"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changed the base's weights"),
        ({"some_future_feature": "on"}, "some_future_feature='on' has no equal"),
        ({"r": 5}, "q_proj has rank 3, adapter_config.json says 5"),
        ({"rank_pattern": {"q_proj": 7}}, "q_proj has rank 3, adapter_config.json says 7"),
        ({"r": "many"}, "a value of another kind"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_has_no_equal_is_refused_by_name(base_folder, tmp_path, fields, message):
    write(tmp_path / "peft", LINEAR, **fields)
    with pytest.raises(AdapterError, match=message):
        import_adapter(tmp_path / "peft", tmp_path / "native", base_folder)
    assert os.listdir(tmp_path) == ["peft"]


def test_harmless_fields_of_a_full_configuration_are_taken(base_folder, tmp_path):
    fields = {"loftq_config": {}, "eva_config": None, "megatron_core": "megatron.core", "qalora_group_size": 16}
    write(tmp_path / "peft", LINEAR, lora_dropout=0.1, init_lora_weights="gaussian", **fields)
    (bank,) = import_adapter(tmp_path / "peft", tmp_path / "native", base_folder).values()
    assert (bank.preset, bank.targets, bank.r) == ("lora", ("model.layers.0.self_attn.q_proj",), R)
    assert (bank.alpha, bank.dropout) == (6, 0.1)


def expert(layer, e, matrix, pair):
    return {f"model.layers.{layer}.mlp.experts.{e}.{matrix}.lora_{f}.weight": pair[f] for f in "AB"}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (LINEAR | {"model.norm.weight": torch.ones(32)}, r"model\.norm\.weight is no factor of a LoRA"),
        (LINEAR | {"lm_head.lora_magnitude_vector": torch.ones(3, 3)}, "lora_magnitude_vector is no factor"),
        (dict(list(LINEAR.items())[:1]), r"q_proj has no lora_B"),
        ({k.replace("q_proj", "r_proj"): t for k, t in LINEAR.items()}, r"r_proj\.lora_\* adapt nothing"),
        ({k: t[:, :3] if k.endswith("A.weight") else t for k, t in LINEAR.items()}, r"lora_A \(3, 3\)"),
        (
            expert(0, 0, "down_proj", {"A": torch.ones(R, 16), "B": torch.ones(32, R)}),
            "0 to 7 must all have a pair",
        ),
        (expert(0, 0, "w2", {"A": torch.ones(R, 16), "B": torch.ones(32, R)}), "experts of this family have no w2"),
        ({k.replace("experts", "experts.base_layer"): t for k, t in fused(factors()).items()}, "three wrappers"),
        ({}, "holds no tensor"),
    ],
    ids=["norm", "magnitude", "no B", "unknown", "misshapen", "one expert", "w2", "biases", "empty"],
)
def test_tensors_that_fit_nowhere_are_refused_by_name(base_folder, tmp_path, tensors, message):
    write(tmp_path / "peft", tensors)
    with pytest.raises(AdapterError, match=message):
        import_adapter(tmp_path / "peft", tmp_path / "native", base_folder)
    assert os.listdir(tmp_path) == ["peft"]


def test_folders_that_are_none_are_refused(base_folder, tmp_path):
    with pytest.raises(AdapterError, match=r"has no adapter_config\.json"):
        import_adapter(tmp_path, tmp_path / "native", base_folder)
    write(tmp_path / "peft", LINEAR)
    with pytest.raises(AdapterError, match=r"has no config\.json"):
        import_adapter(tmp_path / "peft", tmp_path / "native", tmp_path)
    file = tmp_path / "peft" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(AdapterError, match="is damaged"):
        import_adapter(tmp_path / "peft", tmp_path / "native", base_folder)
    file.unlink()
    with pytest.raises(AdapterError, match="safe_serialization"):
        import_adapter(tmp_path / "peft", tmp_path / "native", base_folder)
    (tmp_path / "peft" / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="cannot be read"):
        import_adapter(tmp_path / "peft", tmp_path / "native", base_folder)


def test_the_hand_made_recipes_are_what_peft_writes(base_folder, tmp_path):
    """The layouts above have the keys and shapes of the installed PEFT's files."""
    options = {"r": R, "lora_alpha": 6, "target_parameters": BOTH, "target_modules": []}
    get_peft_model(base_of(base_folder), LoraConfig(**options)).save_pretrained(tmp_path / "peft")
    found = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    made = {f"base_model.model.{key}": tensor for key, tensor in fused(factors()).items()}
    assert {key: tensor.shape for key, tensor in found.items()} == {key: tensor.shape for key, tensor in made.items()}
