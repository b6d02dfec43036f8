"""An upcycled model is the dense model, until it trains."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from moe.folder import new_folder, read_tensors, write_tensors
from moe.load import FolderError
from moe.upcycle import UpcycleError, Upcycling, upcycle
from trainer.cli import main

TARGETS = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}


def dense_folder(path, family="qwen3", dtype=torch.float32, **fields):
    config = AutoConfig.for_model(
        family, vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, intermediate_size=48, max_position_embeddings=64, initializer_range=0.2,
        bos_token_id=None, eos_token_id=None, **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") or "norm" in name:  # what initialisation leaves at zero or one would hide a loss
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    model.save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return model


def logits(model):
    ids_BS = torch.arange(24).view(2, 12) * 5 % 64
    with torch.no_grad():
        return model.eval()(input_ids=ids_BS).logits


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize(
    "how",
    [
        Upcycling(copies=4, top_groups=2),
        Upcycling(copies=1, parts=4, top_groups=1),  # all parts chosen
        Upcycling(copies=3, parts=4, top_groups=2),  # whole virtual groups chosen
        Upcycling(copies=4, top_groups=2, router_std=0.0),
    ],
    ids=["copies", "parts", "groups", "zero-router"],
)
def test_the_upcycled_model_computes_what_the_dense_one_did(tmp_path, family, how):
    dense = dense_folder(tmp_path / "dense", family)
    upcycle(tmp_path / "dense", tmp_path / "moe", how)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert model.config.model_type == TARGETS[family]
    assert [name for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[name]] == []
    assert model.model.layers[1].mlp.experts.down_proj.shape == (how.num_experts, 32, 48 // how.parts)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-5)
    assert (tmp_path / "moe" / "tokenizer.json").read_text() == "{}"


def test_tied_embeddings_and_the_dtype_are_kept(tmp_path):
    dense_folder(tmp_path / "dense", "qwen3", torch.bfloat16, tie_word_embeddings=True)
    upcycle(tmp_path / "dense", tmp_path / "moe", Upcycling())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype="auto")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_router_of_zeros_still_spreads_tokens(tmp_path):
    dense_folder(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", Upcycling(copies=8, top_groups=2, router_std=0.0))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    x_TH = torch.randn(256, 32, generator=torch.Generator().manual_seed(1))
    _, weights_TK, index_TK = model.model.layers[0].mlp.gate(x_TH)
    assert len(index_TK.unique()) == 8
    torch.testing.assert_close(weights_TK, torch.full_like(weights_TK, 0.5), rtol=1e-4, atol=0)


def test_noise_is_relative_seeded_and_spares_the_first_copy(tmp_path):
    dense = dense_folder(tmp_path / "dense")
    made = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        upcycle(tmp_path / "dense", tmp_path / name, Upcycling(copies=3, noise=0.1, seed=seed))
        made[name] = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name).model.layers[0].mlp.experts.down_proj.detach()
        )
    original = dense.model.layers[0].mlp.down_proj.weight.detach()
    assert torch.equal(made["a"], made["b"])
    assert not torch.equal(made["a"], made["c"])
    assert torch.equal(made["a"][0], original)
    for copy in (1, 2):
        assert float((made["a"][copy] - original).std() / original.std()) == pytest.approx(0.1, rel=0.1)
    assert not torch.equal(made["a"][1], made["a"][2])


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"copies": 0}, "at least 1"),
        ({"copies": 2, "top_groups": 3}, "1 to copies=2"),
        ({"noise": -1.0}, "0 or more"),
        ({"router_std": float("nan")}, "0 or more"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(how, said):
    with pytest.raises(UpcycleError, match=said):
        Upcycling(**how)


@pytest.mark.parametrize(
    ("family", "fields", "how", "said"),
    [
        ("qwen3", {}, {"parts": 5}, "does not divide the intermediate size 48"),
        ("llama", {"mlp_bias": True}, {}, "mlp_bias"),
        ("qwen2", {"use_sliding_window": True}, {}, "sliding windows"),
        ("gemma2", {}, {}, "'gemma2' cannot be upcycled"),
    ],
)
def test_what_the_family_cannot_express_is_refused_and_leaves_nothing(tmp_path, family, fields, how, said):
    dense_folder(tmp_path / "dense", family, **fields)
    with pytest.raises(UpcycleError, match=said):
        upcycle(tmp_path / "dense", tmp_path / "moe", Upcycling(**how))
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_folder_that_lacks_a_block_is_refused_and_leaves_nothing(tmp_path):
    dense_folder(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "layer_types": None}))
    with pytest.raises(UpcycleError, match=r"model\.layers\.2\.mlp"):
        upcycle(tmp_path / "dense", tmp_path / "moe", Upcycling())
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_the_command_writes_a_folder_and_refuses_one_that_exists(tmp_path, capsys):
    dense_folder(tmp_path / "dense")
    words = ["upcycle", str(tmp_path / "dense"), str(tmp_path / "moe"), "--copies", "2", "--parts", "3"]
    assert main([*words, "--top-groups", "1", "--noise", "0.01", "--router-std", "0.1", "--seed", "3"]) == 0
    config = AutoConfig.from_pretrained(tmp_path / "moe")
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (6, 3, 16)
    assert "6 experts" in capsys.readouterr().out
    assert main(words) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["upcycle", str(tmp_path / "none"), str(tmp_path / "other")]) == 2
    assert "no config.json" in capsys.readouterr().err


def test_shards_are_cut_by_size_and_the_index_names_them(tmp_path):
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(5)}
    with new_folder(tmp_path / "out") as folder:
        assert write_tensors(tensors.items(), folder, shard_bytes=900) == 5
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-0000{i}.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, framework="pt") as shard:
            assert torch.equal(shard.get_tensor(name), tensors[name])
    assert dict(read_tensors(tmp_path / "out")).keys() == tensors.keys()


def test_a_folder_that_fails_half_way_is_not_there(tmp_path):
    with pytest.raises(FolderError, match="comes twice"), new_folder(tmp_path / "out") as folder:
        write_tensors([("a", torch.zeros(1)), ("a", torch.zeros(1))], folder)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FolderError, match="holds no model"):
        list(read_tensors(tmp_path))
