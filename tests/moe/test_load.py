"""Loading a folder tensor by tensor: transformers' bits, only this rank's bytes, and nothing left to chance."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from moe.convert import convert
from moe.families import FamilyError
from moe.family_table import FAMILIES
from moe.layout import Layout
from moe.load import empty_model, fill, read_config
from moe.save import whole_model, write_folder

EVERY = pytest.mark.parametrize("family", sorted(FAMILIES))


@pytest.fixture(scope="module")
def folders(tiny_family, tmp_path_factory):
    """One folder of each family as transformers writes it."""
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        tiny_family(family).save_pretrained(root / family)
    return root


def load(folder, layout=None, rank=0, dtype=torch.float32):
    model = empty_model(folder, dtype=dtype)
    convert(model, layout, rank)
    return model, fill(model, folder)


def everything(model):
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_are_those_of_from_pretrained(folders, family, dtype):
    theirs = everything(AutoModelForCausalLM.from_pretrained(folders / family, dtype=dtype))
    model, _ = load(folders / family, dtype=dtype)
    ours = everything(model)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
        assert ours[name].requires_grad == tensor.requires_grad
    assert model.config.dtype == dtype
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings


@EVERY
def test_each_of_two_ranks_reads_its_half_of_the_experts_and_no_more(folders, family):
    whole, everything_read = load(folders / family)
    stored = load_file(folders / family / "model.safetensors")
    assert everything_read == sum(tensor.nbytes for tensor in stored.values())
    experts = sum(p.numel() * 4 for p in whole.parameters() if p.address.is_expert)
    full = everything(whole)
    for rank in range(2):
        half, read = load(folders / family, Layout(2, 2), rank)
        assert read == everything_read - experts // 2
        for name, tensor in everything(half).items():
            mine = slice(4 * rank, 4 * rank + 4) if ".experts." in name else slice(None)
            assert torch.equal(tensor, full[name][mine]), name
            assert name in dict(half.named_buffers()) or hasattr(tensor, "address")


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_was_loaded_by_two_ranks_is_exported_byte_for_byte(folders, family, dtype, tmp_path):
    source = folders / family
    if dtype != torch.float32:
        source = tmp_path / "half"
        AutoModelForCausalLM.from_pretrained(folders / family, dtype=dtype).save_pretrained(source)
    ranks = [dict(load(source, Layout(2, 2), rank, dtype)[0].named_parameters()) for rank in range(2)]
    tensors = {
        name: torch.cat([half[name].detach() for half in ranks]) if tensor.address.is_expert else tensor.detach()
        for name, tensor in ranks[0].items()
    }
    write_folder(whole_model(read_config(source), tensors, source), tmp_path / "out")
    stored, exported = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert exported.keys() == stored.keys()
    for name, tensor in stored.items():
        assert exported[name].dtype == tensor.dtype, name
        assert torch.equal(exported[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_an_incomplete_set_of_tensors_is_not_exported(folders):
    tensors = dict(load(folders / "olmoe")[0].named_parameters())
    tensors.pop("model.norm.weight")
    tensors["model.extra"] = torch.zeros(1)
    with pytest.raises(FamilyError, match=r"olmoe model: model\.extra, model\.norm\.weight"):
        whole_model(read_config(folders / "olmoe"), tensors)


@pytest.fixture
def copied(folders, tmp_path):
    """Copies a family's folder with other tensors."""

    def copy(family, change):
        folder = tmp_path / family
        shutil.copytree(folders / family, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return copy


def refusal(folder, rank=0):
    with pytest.raises(FamilyError) as error:
        load(folder, Layout(2, 2), rank)
    return str(error.value)


@EVERY
def test_missing_surplus_and_misshapen_tensors_are_named(copied, family):
    names, block = FAMILIES[family].expert_names, FAMILIES[family].block_on_disk
    expert = f"{block}.experts.7.{names[2]}.weight" if names else f"{block}.experts.down_proj_bias"

    def spoil(tensors):
        tensors.pop(f"model.layers.1.{expert}")  # of the other rank: it must be there all the same
        tensors["model.layers.1.mlp.surprise"] = torch.zeros(1)
        tensors["model.norm.weight"] = torch.zeros(31)

    said = refusal(copied(family, spoil))
    assert f"missing model.layers.1.{expert}" in said
    assert "not in the model model.layers.1.mlp.surprise" in said
    assert "model.norm.weight has shape [31], config.json asks for [32]" in said
    assert family in said


def test_a_missing_correction_bias_is_named(copied):
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert f"missing {name}" in refusal(copied("deepseek_v3", lambda tensors: tensors.pop(name)))


def test_integers_are_no_weights(copied):
    def quantise(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)

    assert "model.norm.weight is I8; only F64, F32, BF16, F16 can be trained" in refusal(copied("olmoe", quantise))


def test_a_head_that_is_tied_may_be_stored_too_if_it_is_the_same(copied, tmp_path):
    def tie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    folder = copied("qwen3_moe", tie)
    model, _ = load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lm_head.weight is tied to model.embed_tokens.weight and yet another tensor" in refusal(folder)


def test_stacked_experts_and_shards_load_as_well(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders / "mixtral")
    model.save_pretrained(tmp_path, max_shard_size="20KB", save_original_format=False)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    want = everything(load(folders / "mixtral", Layout(2, 2), 1)[0])
    got = everything(load(tmp_path, Layout(2, 2), 1)[0])
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert f"lacks {shard.name}" in refusal(tmp_path)


def test_a_folder_without_a_model_a_damaged_one_and_a_foreign_one_are_refused(folders, tmp_path):
    with pytest.raises(FamilyError, match=r"has no config\.json"):
        read_config(tmp_path)
    damaged = tmp_path / "damaged"
    shutil.copytree(folders / "olmoe", damaged)
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert "no whole safetensors file" in refusal(damaged)
    file.unlink()
    assert "holds no model*.safetensors" in refusal(damaged)
    for kind in ("gpt2", "granitemoe", "nonsense", None):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(FamilyError, match=rf"looked for model_type mixtral, .*; found {kind!r}"):
            read_config(tmp_path)


def test_a_quantised_folder_is_refused_with_its_method(tmp_path):
    MixtralConfig(quantization_config={"quant_method": "mxfp4"}).save_pretrained(tmp_path)
    said = rf"{tmp_path}/config.json has a quantization_config \(mxfp4\)"
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(FamilyError, match=rf"{said}, but all .* plain \(F32 in model.safetensors\); remove the entry"):
        read_config(tmp_path)
    save_file({"a": torch.zeros(2), "b": torch.zeros(2).to(torch.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(FamilyError, match=rf"{said}, and model.safetensors is quantised: its b is U8; load"):
        read_config(tmp_path)
