"""The doctor finds what was broken on purpose, says where, and finds nothing in a sound model."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

import moe.experts
from trainer import cli, doctor, doctor_training
from trainer.doctor_files import Statistics
from trainer.doctor_model import check_model
from trainer.doctor_report import Report
from trainer.doctor_training import check_groups
from trainer.engine import parameter_groups

COMMON = {
    "vocab_size": 192, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "num_experts_per_tok": 2, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
QWEN3 = {"num_experts": 8, "moe_intermediate_size": 16, "intermediate_size": 16, "head_dim": 16, "norm_topk_prob": True}
DEEPSEEK_V3 = {
    "n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 16, "intermediate_size": 24, "n_group": 2,
    "topk_group": 1, "routed_scaling_factor": 1.5, "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1,
}  # fmt: skip


def trained(family, fields, **more):
    """A model whose weights no longer look like fresh ones."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**COMMON, **fields, **more}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(1.5).add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    disable_progress_bar()
    folders = {}
    for name, family, fields in [("qwen3", "qwen3_moe", QWEN3), ("v3", "deepseek_v3", DEEPSEEK_V3)]:
        folders[name] = tmp_path_factory.mktemp("sound") / name
        trained(family, fields).save_pretrained(folders[name])
    return folders


@pytest.fixture
def examine(sound, tmp_path, capsys):
    """Breaks a copy of a sound folder and gives (exit status, failures as (check, where), what was printed)."""

    def run(break_tensors=None, of="qwen3", *options):
        folder = tmp_path / "broken"
        shutil.copytree(sound[of], folder)
        if break_tensors is not None:
            tensors = load_file(folder / "model.safetensors")
            break_tensors(tensors)
            save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
        status = cli.main(["doctor", str(folder), "--json", str(tmp_path / "found.json"), *options])
        found = json.loads((tmp_path / "found.json").read_text())
        failed = [(f["check"], f["where"]) for f in found["findings"] if f["state"] == "failed"]
        assert all(f["remedy"] for f in found["findings"] if f["state"] == "failed")
        assert found["ok"] == (not failed) == (status == 0)
        return status, failed, capsys.readouterr().out

    return run


def expert(layer, number, tensor):
    return f"model.layers.{layer}.mlp.experts.{number}.{tensor}.weight"


ALL = ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("of", ["qwen3", "v3"])
def test_a_sound_model_passes_every_check(examine, of):
    status, failed, out = examine(of=of)
    assert (status, failed) == (0, [])
    for check in ("files", "numbers", "routers", "duplicates", "random init", "parity fp32", "parity bf16", "gradients",
                  "reach"):  # fmt: skip
        assert f"ok          {check}" in out
    assert "experts run here as" in out
    assert "not checked" not in out


def test_a_missing_tensor_of_an_expert_is_named(examine):
    status, failed, out = examine(lambda t: t.pop(expert(1, 3, "up_proj")))
    assert (status, failed) == (1, [("files", "L01.E003.up_proj")])
    assert "not checked parity" in out


def test_a_surplus_tensor_is_named(examine):
    _, failed, _ = examine(lambda t: t.update({expert(1, 8, "up_proj"): t[expert(1, 3, "up_proj")] * 2}))
    assert ("files", "L01.E008.up_proj") in failed


def test_exchanged_tensors_are_found_by_their_shapes(examine):
    def exchange(t):
        a, b = expert(0, 5, "up_proj"), expert(0, 5, "down_proj")
        t[a], t[b] = t[b], t[a]

    assert examine(exchange)[:2] == (1, [("files", "L00.E005.down_proj"), ("files", "L00.E005.up_proj")])


def test_an_expert_left_at_random_init_is_found_among_trained_ones(examine):
    def forget(t):
        for tensor in ALL:
            t[expert(1, 6, tensor)] = torch.randn_like(t[expert(1, 6, tensor)]) * 0.02

    assert examine(forget)[:2] == (1, [("random init", "L01.E006")])


def test_a_new_model_is_not_called_forgotten(examine):
    def renew(t):
        for layer in range(2):
            for number in range(8):
                for tensor in ALL:
                    t[expert(layer, number, tensor)] = torch.randn_like(t[expert(layer, number, tensor)]) * 0.02

    status, failed, out = examine(renew)
    assert (status, failed) == (0, [])
    assert "all experts of 2 layers are fresh: a new model" in out


def test_one_nan_is_found_and_named(examine):
    def poison(t):
        t[expert(0, 2, "gate_proj")][3, 4] = math.nan

    status, failed, out = examine(poison)
    assert (status, failed) == (1, [("numbers", "L00.E002.gate_proj")])
    assert "1 of 512 values" in out


def test_an_expert_of_zeros_is_frozen(examine):
    def freeze(t):
        for tensor in ALL:
            t[expert(1, 4, tensor)].zero_()

    status, failed, out = examine(freeze)
    assert status == 1
    assert failed == [("gradients", "L01.E004.gate_up_proj"), ("gradients", "L01.E004.down_proj")]
    assert "its weights are all zero" in out


def test_an_expert_that_no_token_chooses_is_dead(examine):
    def avoid(t):
        t["model.layers.1.mlp.gate.e_score_correction_bias"][5] = -100.0

    status, failed, out = examine(avoid, "v3")
    assert (status, failed) == (1, [("reach", "L01.E005")])
    assert "is dead: none of 256 random tokens chose it" in out


def test_twins_are_found(examine):
    def copy(t):
        for tensor in ALL:
            t[expert(0, 7, tensor)] = t[expert(0, 1, tensor)].clone()

    status, failed, out = examine(copy)
    assert status == 1
    assert {where for check, where in failed if check == "duplicates"} == {f"L00.E001.{tensor}" for tensor in ALL}
    assert "L00.E001, L00.E007" in out


def test_a_router_without_opinion_and_a_rounded_bias_are_found(examine):
    def flatten(t):
        t["model.layers.1.mlp.gate.weight"].zero_()
        name = "model.layers.1.mlp.gate.e_score_correction_bias"
        t[name] = t[name].bfloat16()

    _, failed, out = examine(flatten, "v3", "--files-only")
    assert ("routers", "model.layers.1.mlp.gate.weight") in failed
    assert ("routers", "model.layers.1.mlp.gate.e_score_correction_bias") in failed
    assert "all 8 rows are the same (zero)" in out


def model_report():
    report = Report("test")
    check_model(trained("qwen3_moe", QWEN3), report, 2)
    return {(f.check, f.where) for f in report.findings if f.state == "failed"}


def test_a_wrong_backend_is_caught_by_parity(monkeypatch):
    right = moe.experts.Experts.forward
    monkeypatch.setattr(moe.experts.Experts, "forward", lambda *args: right(*args) * 1.001)
    failed = model_report()
    assert {("parity fp32", "L00"), ("parity fp32", "L01"), ("parity fp32", "")} <= failed
    monkeypatch.setattr(moe.experts.Experts, "forward", lambda *args: right(*args).detach() + args[1] * 0)
    assert ("gradients", "model.layers.0.mlp.experts.gate_up_proj") in model_report()


def test_a_path_that_rounds_too_early_is_caught_in_bf16_only(monkeypatch):
    right = moe.experts.Experts.forward

    def coarse(self, x, index, weights):
        if x.dtype == torch.bfloat16:
            weights = (weights * 16).round() / 16
        return right(self, x, index, weights)

    monkeypatch.setattr(moe.experts.Experts, "forward", coarse)
    assert {check for check, _ in model_report()} == {"parity bf16"}
    drawn = 0

    def unlucky(self, x, index, weights):
        nonlocal drawn
        drawn += x.dtype == torch.bfloat16
        return coarse(self, x, index, weights) if drawn <= 2 else right(self, x, index, weights)

    monkeypatch.setattr(moe.experts.Experts, "forward", unlucky)
    assert model_report() == set(), "both layers of the first draw only"
    assert drawn == 4


def test_a_parameter_in_no_group_or_in_two_is_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = parameter_groups(model, 0.0)
    named = list(model.named_parameters())
    report = Report("test")
    check_groups(named, groups, report)
    assert report.ok
    groups[0]["params"] = [named[0][1], named[0][1]]
    check_groups(named, groups, report)
    assert [f.where for f in report.findings if f.state == "failed"] == ["0.weight", "1.weight"]


RECIPE = """
model: {family: qwen3_moe, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1,
        moe_intermediate_size: 16, num_experts: 8, num_experts_per_tok: 2}
data: {source: stdlib, include: ["json/*.py"], tokenizer: {kind: bytes}, sequence_length: 32}
parallel: {workers: 2, ep: 2}
train: {steps: 4, global_batch_size: 8, micro_batch_size: 2, lr: 3e-3}
"""


def test_a_recipe_is_examined_as_it_would_train(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    assert cli.main(["doctor", str(path)]) == 0
    out = capsys.readouterr().out
    assert "0 (mod 2): 0..3; 1 (mod 2): 4..7" in out
    assert "deduplicated over gloo: " in out
    assert "ok          optimizer" in out
    # Looking needs no GPU, whatever training does.
    assert cli.main(["doctor", str(path), "model.experts_backend=triton"]) == 0
    capsys.readouterr()
    # One expert per token, normalised: its weight is always 1, and the router never learns.
    assert cli.main(["doctor", str(path), "model.num_experts_per_tok=1"]) == 1
    assert "model.layers.0.mlp.gate.weight: got rounding errors" in capsys.readouterr().out


def test_adapters_of_a_recipe_must_train(sound, tmp_path, capsys, monkeypatch):
    path = tmp_path / "r.yaml"
    tail = RECIPE.split("data:")[1].replace("kind: bytes", "kind: model")
    path.write_text(f"model: {{path: {sound['qwen3']}}}\ndata:{tail}adapter: {{a: {{preset: expert-lora}}}}\n")
    assert cli.main(["doctor", str(path)]) == 0
    out = capsys.readouterr().out
    assert "ok          adapters" in out
    assert "ok          loading        53 of 53 tensors" in out
    right = moe.experts.Experts.mix

    def without_adapter(self, *args, **kwargs):
        kept, self.adapter = self.adapter, None
        try:
            return right(self, *args, **kwargs)
        finally:
            self.adapter = kept

    monkeypatch.setattr(moe.experts.Experts, "mix", without_adapter)
    assert cli.main(["doctor", str(path)]) == 1
    assert "no gradient reached L00.E000.adapter" in capsys.readouterr().out


def test_a_dense_base_of_adapters_is_examined_too(sound, tmp_path, capsys):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    dense = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=260))
    shutil.copytree(sound["qwen3"], tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    dense.save_pretrained(tmp_path / "base")
    assert cli.main(["doctor", str(tmp_path / "base")]) == 0
    assert "llama, dense: a base for adapters" in capsys.readouterr().out
    path = tmp_path / "r.yaml"
    tail = RECIPE.split("data:")[1].replace("kind: bytes", "kind: model").replace("ep: 2", "ep: 1")
    path.write_text(f"model: {{path: {tmp_path / 'base'}}}\ndata:{tail}adapter: {{a: {{preset: lora}}}}\n")
    assert cli.main(["doctor", str(path)]) == 0
    out = capsys.readouterr().out
    assert "ok          adapters" in out
    assert "transformers' own modules run a dense model" in out


def test_our_loader_must_give_what_transformers_gives(sound, tmp_path, capsys, monkeypatch):
    path = tmp_path / "r.yaml"
    tail = RECIPE.split("data:")[1].replace("kind: bytes", "kind: model")
    path.write_text(f"model: {{path: {sound['qwen3']}}}\ndata:{tail}")
    right = doctor_training.build_model

    def forgetful(*args):
        model, blocks = right(*args)
        with torch.no_grad():
            blocks[1].experts.down_proj[2, 0, 0] += 1e-3
        return model, blocks

    monkeypatch.setattr(doctor_training, "build_model", forgetful)
    assert cli.main(["doctor", str(path)]) == 1
    assert "loading        L01.E002.down_proj: is not what transformers loads" in capsys.readouterr().out


def test_mistakes_are_said_in_a_sentence(sound, tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    for arguments, words in [
        (["/nowhere"], "neither a folder nor a recipe"),
        ([str(tmp_path)], "transformers does not take it"),
        ([str(sound["qwen3"]), "train.lr=1"], "has no keys to set"),
    ]:
        assert cli.main(["doctor", *arguments]) == 2
        assert words in capsys.readouterr().err
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    assert cli.main(["doctor", str(tmp_path)]) == 2
    assert "no MoE block" in capsys.readouterr().err
    AutoConfig.for_model("qwen3_moe", **{**COMMON, **QWEN3}).save_pretrained(tmp_path)
    assert cli.main(["doctor", str(tmp_path)]) == 2
    assert "has no *.safetensors file" in capsys.readouterr().err
    monkeypatch.setattr(doctor, "available_bytes", lambda: 2**20)
    assert cli.main(["doctor", str(sound["qwen3"])]) == 2
    assert "takes 0.5 GiB of memory" in capsys.readouterr().err
    assert cli.main(["doctor", str(sound["qwen3"]), "--files-only"]) == 0


def test_fresh_weights_are_told_from_trained_ones():
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(32, 16, generator=generator) * 0.02 for _ in range(200)]
    assert sum(Statistics.of(draw).is_fresh(0.02) for draw in draws) >= 198
    assert not any(Statistics.of(draw * 1.3).is_fresh(0.02) for draw in draws)
    assert not Statistics.of(torch.zeros(32, 16)).is_fresh(0.02)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts_per_tok": 99},
        {"num_experts_per_tok": 0},
        {"num_experts_per_tok": "2"},
        {"hidden_act": "nonsense"},
        {"dtype": "float8"},
        {"num_attention_heads": 0},
        {"quantization_config": {"quant_method": "fp8"}},
        {"quantization_config": "x"},
        3,
    ],
)
def test_a_configuration_that_makes_no_model_is_refused_in_a_line(sound, tmp_path, capsys, fields):
    folder = tmp_path / "model"
    shutil.copytree(sound["qwen3"], folder)
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | fields if isinstance(fields, dict) else fields))
    assert cli.main(["doctor", str(folder), "--files-only"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_files_that_are_none_are_refused_in_a_line(sound, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(sound["qwen3"], folder)
    assert cli.main(["doctor", str(folder), "--files-only", "--json", "/dev/full"]) == 2
    (folder / "model.safetensors.index.json").write_text("[]")
    assert cli.main(["doctor", str(folder), "--files-only"]) == 2
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    assert cli.main(["doctor", str(folder), "--files-only"]) == 2
    full, index, weights = capsys.readouterr().err.strip().splitlines()
    assert "No space left" in full
    assert "is no index" in index
    assert "model.safetensors cannot be read" in weights
