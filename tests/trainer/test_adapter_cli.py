"""`planaria adapter export` and `import` as a user meets them: what they write and say, and what they refuse."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from inference.engine import LLM
from lora.attach import attach
from lora.config import BankConfig
from lora.exactness import FORMS
from lora.format import collect_adapter, load_adapter, save_adapter
from moe.convert import convert
from moe.fingerprint import fingerprint
from trainer.cli import main

LORA = {"e": BankConfig("expert-lora", r=2, alpha=3.0), "a": BankConfig("lora", ("q_proj",), r=2, alpha=3.0)}
ROUTED = {"m": BankConfig("mola", ("q_proj",), r=2)}
TASKS = {"t": BankConfig("moelora-task", ("q_proj",), r=8, num_tasks=2)}
TOKENS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    config = Qwen3MoeConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, vocab_size=64, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "base"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Folders by name: lora, routed, tasks."""
    root = tmp_path_factory.mktemp("adapters")
    for name, banks in {"lora": LORA, "routed": ROUTED, "tasks": TASKS}.items():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        attach(model, banks, convert(model))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if ".adapter." in path:
                    parameter.normal_(0, 0.2, generator=generator)
        save_adapter(root / name, collect_adapter(model), banks, fingerprint(base), base_model=str(base))
    loaded = load_adapter(root / "lora")
    save_adapter(root / "elsewhere", loaded.tensors, loaded.banks, fingerprint(base))  # its base was not at hand
    return root


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.filterwarnings("ignore:.*rank_pattern", "ignore:.*alpha_pattern")
def test_every_form_of_a_plain_adapter_computes_the_same(base, adapters, tmp_path, capsys):
    def run(*arguments):
        assert main(["adapter", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    for form in ("peft", "peft-per-expert", "merged"):
        where = ["--base", base] if form == "merged" else []
        said = run("export", adapters / "lora", tmp_path / form, "--to", form, *where)
        assert str(tmp_path / form) in said
    assert "lost to rounding" in said
    models = [AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32) for _ in range(2)]
    fused, apart = (
        logits(PeftModel.from_pretrained(model, tmp_path / form))
        for model, form in zip(models, ("peft", "peft-per-expert"), strict=True)
    )
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    assert torch.equal(fused, apart)
    assert (merged - fused).norm() / fused.norm() < 1e-5
    said = run("import", tmp_path / "peft-per-expert", tmp_path / "back", "--base", base)
    assert "experts: expert-lora r=2 alpha=3 on mlp.experts.down_proj, mlp.experts.gate_up_proj" in said
    want = load_adapter(adapters / "lora").tensors
    assert all(torch.equal(load_adapter(tmp_path / "back").tensors[path], tensor) for path, tensor in want.items())
    run("export", adapters / "tasks", tmp_path / "tasks", "--to", "tasks")
    assert sorted(os.listdir(tmp_path / "tasks")) == ["task-0", "task-1"]


def test_dropout_that_peft_cannot_have_is_said(base, tmp_path, capsys):
    fields = {"r": 2, "alpha": 3.0}
    tasks = BankConfig("moelora-task", ("q_proj",), r=8, num_tasks=2, dropout=0.1)
    same, other = (BankConfig("lora", (name,), dropout=p, **fields) for name, p in (("q_proj", 0.1), ("v_proj", 0.2)))
    stacked = BankConfig("expert-lora", dropout=0.1, **fields)
    for form, banks, said in [
        ("peft", {"a": same}, None),
        (
            "peft",
            {"a": same, "b": other},
            "lora_dropout 0, the banks have adapter.a 0.1, adapter.b 0.2: PEFT takes one",
        ),
        ("peft", {"a": same, "e": stacked}, "lora_dropout 0, the banks have adapter.a 0.1, adapter.e 0.1"),
        ("peft-per-expert", {"e": stacked}, "lora_dropout 0, the banks have adapter.e 0.1"),
        ("tasks", {"t": tasks}, "lora_dropout 0, the banks have adapter.t 0.1"),
    ]:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        attach(model, banks, convert(model))
        folder, out = tmp_path / f"{form}-{'-'.join(banks)}", tmp_path / f"{form}-{'-'.join(banks)}-out"
        save_adapter(folder, collect_adapter(model), banks, fingerprint(base), base_model=str(base))
        assert main(["adapter", "export", str(folder), str(out), "--to", form]) == 0
        text = capsys.readouterr().out
        assert said in text if said else "lora_dropout" not in text, (form, banks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixlora_on_a_dense_model_becomes_a_mixture(tmp_path, capsys, dtype):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    banks = {"f": BankConfig("mixlora", num_experts=3, r=2)}
    attach(model, banks, [])
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if ".adapter." in path:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(path)))
    base = str(tmp_path / "base")
    save_adapter(tmp_path / "a", collect_adapter(model), banks, fingerprint(base), base_model=base)
    out = tmp_path / "moe"
    assert main(["adapter", "export", str(tmp_path / "a"), str(out), "--to", "upcycled", "--base", base]) == 0
    said = capsys.readouterr().out
    assert "wrote a mixtral with 2 experts for each token" in said
    assert ("its routers compute in bfloat16 where planaria's compute in fp32" in said) == (dtype == torch.bfloat16)
    assert AutoConfig.from_pretrained(out).dtype == dtype
    if dtype != torch.float32:
        return
    got, want = logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)), logits(model)
    assert (got - want).norm() / want.norm() < 2e-6


def test_mistakes_are_said_in_a_sentence_and_leave_nothing(base, adapters, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    shutil.copytree(adapters / "lora", tmp_path / "run" / "adapter")
    peft = tmp_path / "peft"
    assert main(["adapter", "export", str(adapters / "lora"), str(peft), "--to", "peft"]) == 0
    said = capsys.readouterr()
    out = tmp_path / "out"
    cases = [
        (["export", tmp_path / "no", out, "--to", "peft"], "is no adapter: it has no manifest.json"),
        (["export", adapters, out, "--to", "peft"], "give a folder written by `planaria export`"),
        (["export", tmp_path / "run", out, "--to", "peft"], f"give {tmp_path / 'run' / 'adapter'}"),
        (["export", peft, out, "--to", "peft"], "make an adapter of it with `planaria adapter import`"),
        (["export", adapters / "routed", out, "--to", "peft"], "adapter.m (mola) weighs its experts by a router"),
        (["export", adapters / "routed", out, "--to", "merged", "--base", base], "cannot be written as merged"),
        (["export", adapters / "lora", out, "--to", "tasks"], "no bank is routed by task"),
        (["export", adapters / "lora", out, "--to", "upcycled", "--base", base], "cannot be written as upcycled"),
        (["export", adapters / "lora", out, "--to", "merged"], "name its folder with --base DIR"),
        (["export", adapters / "elsewhere", out, "--to", "peft-per-expert"], "name the base's folder with --base"),
        (["export", adapters / "lora", out, "--to", "merged", "--base", other], "the adapter was trained on base"),
        (["export", adapters / "lora", out, "--to", "merged", "--base", bare], "holds no *.safetensors file"),
        (["export", adapters / "lora", out, "--to", "merged", "--base", tmp_path], "has no config.json"),
        (["export", adapters / "lora", peft, "--to", "peft"], "exists; give another folder or remove it"),
        (["export", adapters / "lora", adapters / "lora", "--to", "peft"], "exists; give another folder"),
        (["import", base, out, "--base", base], "has no adapter_config.json"),
        (["import", peft, out, "--base", bare], "holds no *.safetensors file"),
        (["import", peft, out, "--base", tmp_path / "no"], "has no config.json"),
        (["import", peft, base, "--base", base], "which is no file of an adapter"),
        (["import", peft, weights / "x", "--base", base], str(weights)),
    ]
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in cases:
        assert main(["adapter", *map(str, arguments)]) == 2, arguments
        said = capsys.readouterr()
        assert message in said.err, (arguments, said.err)
        assert said.err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before, arguments


def test_arrow_of_several_adapters_is_made_and_answers(base, adapters, tmp_path, capsys):
    plain = []
    for seed in (1, 2):
        loaded = load_adapter(adapters / "tasks")
        banks = {"a": BankConfig("lora", ("q_proj",), r=1, alpha=2.0 + seed)}
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            path: torch.randn(1, *tensor.shape[1:], generator=generator)
            for path, tensor in loaded.tensors.items()
            if path.endswith((".A", ".B"))
        }
        save_adapter(tmp_path / f"plain-{seed}", tensors, banks, fingerprint(base))
        plain.append(tmp_path / f"plain-{seed}")
    made = tmp_path / "made"
    assert main(["adapter", "arrow", str(made), *map(str, plain), "--top-k", "1", "--temperature", "0.5"]) == 0
    said = capsys.readouterr().out
    assert "arrow: targets [q_proj], site linear, adapters [" in said
    assert "top_k 1" in said
    assert "temperature 0.5" in said
    assert load_adapter(made).banks["arrow"].num_experts == 2
    with_it = generated(base, made)
    assert all(tensor.isfinite().all() for tensor in load_adapter(made).tensors.values())
    assert with_it.isfinite().all()
    assert not torch.equal(with_it, generated(base, plain[0]))

    for wrong, message in [
        ([tmp_path / "x", plain[0], adapters / "routed", "--top-k", "1"], "adapter.m (mola) weighs its experts"),
        ([tmp_path / "x", plain[0], plain[0], "--top-k", "1"], "twice; keep one"),
        ([tmp_path / "x", plain[0], "--top-k", "1"], "list two or more"),
        ([tmp_path / "x", *plain], "top_k=3 is more than num_experts=2; choose fewer"),
        ([tmp_path / "x", *plain, "--top-k", "1", "--temperature", "0"], "temperature must be more than 0, not 0.0"),
        ([tmp_path / "x", plain[0], tmp_path / "none"], "is no adapter: it has no manifest.json"),
    ]:
        assert main(["adapter", "arrow", *map(str, wrong)]) == 2, wrong
        said = capsys.readouterr()
        assert message in said.err, (wrong, said.err)
        assert not (tmp_path / "x").exists()


def generated(base, adapter):
    """Logits of the inference engine."""
    with torch.no_grad():
        return LLM(base, expert_budget=1.0, adapter=adapter, device="cpu").model(TOKENS).logits


def test_damage_to_a_base_that_fits_is_said(base, adapters, tmp_path, capsys):
    """A base with the right name and broken files: the adapter is made to be of this one."""
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    loaded = load_adapter(adapters / "lora")
    save_adapter(tmp_path / "a", loaded.tensors, loaded.banks, fingerprint(broken), base_model=str(broken))
    assert (
        main(["adapter", "export", str(tmp_path / "a"), str(tmp_path / "out"), "--to", "merged", "--base", str(broken)])
        == 2
    )
    assert "a file of its weights is damaged" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["a", "broken"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["adapter"],
        ["adapter", "export", "a", "b"],
        ["adapter", "export", "a", "b", "--to", "gguf"],
        ["adapter", "import", "a", "b"],
        ["adapter", "import", "a", "b", "--base", "c", "--lora-b-layout", "sideways"],
        ["adapter", "export", "a", "b", "--to", "peft", "surplus"],
    ],
)  # fmt: skip
def test_argparse_refuses_what_it_does_not_know(arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_the_forms_are_those_that_the_manifest_judges(adapters):
    exports = json.loads((adapters / "lora" / "manifest.json").read_text())["exports"]
    assert tuple(exports) == FORMS
