from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
)

from inference.engine import LLM
from inference.errors import InferenceError
from inference.requests import Request
from inference.runtime import Runtime
from trainer import cli, generate

BUDGETS = [0.0, 0.1, 1.0]
TOTAL = 64  # 4 layers of 16 experts


@pytest.fixture(scope="module")
def expected(model_folder, prompts, huggingface_tokens):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokens = huggingface_tokens(model, prompts, 64)
    assert len({t for row in tokens for t in row}) > 100, "the reference must not be a constant text"
    return tokens


@pytest.mark.parametrize("budget", BUDGETS)
def test_greedy_tokens_equal_those_of_transformers(model_folder, prompts, expected, budget):
    llm = LLM(model_folder, expert_budget=budget, device="cpu", poison=True)
    assert [g.token_ids for g in llm.generate(prompts, 64)] == expected


def test_logits_have_the_same_bits_at_every_budget(model_folder, prompts):
    runs = []
    for budget in BUDGETS:
        llm = LLM(model_folder, expert_budget=budget, device="cpu", poison=True)
        runs.append([llm.logits(prompt) for prompt in prompts])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_logits_are_those_of_the_eager_model(model_folder, prompts):
    model = AutoModelForCausalLM.from_pretrained(model_folder, experts_implementation="eager")
    llm = LLM(model_folder, expert_budget=0.1, device="cpu")
    for prompt in prompts[:4]:
        with torch.no_grad():
            theirs = model(input_ids=torch.tensor([prompt])).logits[0]
        assert torch.allclose(llm.logits(prompt), theirs, rtol=1e-4, atol=1e-4)


def test_no_expert_is_a_parameter_and_the_budget_is_all_that_is_resident(model_folder, prompts):
    llm = LLM(model_folder, expert_budget=0.1, device="cpu")
    per_expert = 3 * 64 * 32 * 4
    assert llm.cache.blocks_CB.untyped_storage().nbytes() == 6 * per_expert
    llm.generate(prompts[:2], 8)
    assert llm.cache.blocks_CB.untyped_storage().nbytes() == 6 * per_expert
    tensors = [*llm.model.named_parameters(), *llm.model.named_buffers()]
    assert not any("experts" in name for name, _ in tensors)
    assert not any(tensor.is_meta for _, tensor in tensors)
    dense = sum(tensor.nbytes for _, tensor in llm.model.named_parameters())
    whole = sum(p.nbytes for p in AutoModelForCausalLM.from_pretrained(model_folder).parameters())
    assert dense == whole - TOTAL * per_expert


def test_stats_account_for_every_expert_of_every_layer_call(model_folder, prompts):
    llm = LLM(model_folder, expert_budget=1.0, device="cpu")
    llm.generate([prompts[0]], 10)
    first = llm.stats()
    assert first.misses == first.resident == first.bytes_fetched // (3 * 64 * 32 * 4)
    assert first.slots == first.total_experts == TOTAL
    assert first.new_tokens == 10
    assert first.seconds > 0
    # All that a repetition needs is resident, and one new token asks each of 4 layers for 4 experts.
    llm.generate([prompts[0]], 10)
    again = llm.stats()
    assert again.misses == first.misses
    assert again.hits - first.hits == first.hits + first.misses
    assert 4 * 4 * 9 < again.hits - first.hits <= 4 * (4 * 9 + 4 * len(prompts[0]))
    line = str(again)
    for part in (f"{again.hits} hits", f"{again.misses} misses", f"{again.resident}/64 resident", "20 tokens in"):
        assert part in line


def test_a_sharded_folder_gives_the_same_logits(model_folder, prompts, tmp_path):
    AutoModelForCausalLM.from_pretrained(model_folder).save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    sharded, whole = (LLM(path, expert_budget=0.1, device="cpu", poison=True) for path in (tmp_path, model_folder))
    assert torch.equal(sharded.logits(prompts[9]), whole.logits(prompts[9]))


def test_text_goes_in_and_comes_out(model_folder):
    llm = LLM(model_folder, expert_budget=0.5, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    (generation,) = llm.generate(["The gate scores"], 12)
    assert generation.prompt_ids == tuple(tokenizer("The gate scores")["input_ids"])
    assert generation.text == tokenizer.decode(generation.token_ids, skip_special_tokens=True)
    assert generation.finish == "length"
    assert len(generation.token_ids) == 12


def test_stops_at_the_end_of_sequence_token(model_folder, prompts, expected, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "copy")
    end = expected[0][20]
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [{end}]}}')
    (generation,) = LLM(folder, device="cpu").generate([prompts[0]], 64)
    assert generation.finish == "eos"
    assert generation.token_ids == expected[0][: expected[0].index(end) + 1]


def test_sampling_repeats_with_its_seed(model_folder, prompts):
    llm = LLM(model_folder, expert_budget=0.1, device="cpu")

    def sample(seed):
        return [g.token_ids for g in llm.generate([prompts[0], prompts[0]], 16, temperature=1.0, seed=seed)]

    assert sample(5) == sample(5)
    assert sample(5)[1] == sample(6)[0], "prompt i draws from stream seed + i"
    assert sample(5)[0] != sample(5)[1]


LATENT = {
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_shared_experts": 1,
}
FAMILIES = {
    MixtralConfig: {"intermediate_size": 48, "num_local_experts": 4, "tie_word_embeddings": True},
    OlmoeConfig: {"intermediate_size": 16, "num_experts": 8},
    Qwen2MoeConfig: {
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "num_experts": 8,
        "mlp_only_layers": [0],
    },
    DeepseekV2Config: LATENT | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    DeepseekV3Config: LATENT | {"q_lora_rank": 16, "n_group": 2, "topk_group": 1},
    GptOssConfig: {"intermediate_size": 16, "num_local_experts": 8, "head_dim": 16},
}


def tiny(config_class, **sizes):
    torch.manual_seed(1)
    common = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2}
    common |= {"num_experts_per_tok": 2, "vocab_size": 96, "max_position_embeddings": 64, "initializer_range": 0.2}
    ends = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
    return AutoModelForCausalLM.from_config(config_class(**common, **ends, **sizes)).eval()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_other_families(family, tmp_path, huggingface_tokens):
    model = tiny(family, **FAMILIES[family])
    model.save_pretrained(tmp_path)
    llm = LLM(tmp_path, expert_budget=0.3, device="cpu", poison=True)
    prompts = [[5, 6, 7], [80, 3]]
    assert [g.token_ids for g in llm.generate(prompts, 24, ignore_eos=True)] == huggingface_tokens(model, prompts, 24)
    with pytest.raises(InferenceError, match="has no tokenizer"):
        llm.generate(["text"], 4)
    text = list(range(3, 33))
    for budget in (0.0, 0.1, 0.25, 1.0):
        other = LLM(tmp_path, expert_budget=budget, device="cpu", poison=True)
        assert torch.equal(other.logits(text), llm.logits(text)), budget


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty prompt"),
        ("", "empty prompt"),
        ([512], "token 512 is outside"),
        ([1] * 250, "exceed the model's 256"),
    ],
)
def test_bad_prompts_are_refused(model_folder, prompt, message):
    with pytest.raises(InferenceError, match=message):
        LLM(model_folder, expert_budget=0.0, device="cpu").generate([[1], prompt], 16)


def test_bad_settings_are_refused(model_folder):
    with pytest.raises(InferenceError, match="out of range"):
        LLM(model_folder, expert_budget=25)
    llm = LLM(model_folder, expert_budget=0.0, device="cpu")
    with pytest.raises(InferenceError, match="give a list"):
        llm.generate("one string", 4)
    with pytest.raises(InferenceError, match="at least 1"):
        llm.generate([[1]], 0)


def test_the_command_prints_text_and_figures(model_folder, capsys):
    assert generate.main(str(model_folder), "The gate", None, 8, Runtime(0.25)) == 0
    *text, line = capsys.readouterr().out.rstrip("\n").split("\n")
    (generation,) = LLM(model_folder).generate(["The gate"], 8)
    assert "\n".join(text) == generation.text
    assert line.startswith("experts: ")
    assert "/64 resident; 8 tokens in" in line
    assert generate.main(str(model_folder / "nowhere"), "The gate", None, 8, Runtime(0.25)) == 2
    assert "no such folder" in capsys.readouterr().err
    command = ["generate", str(model_folder), "--prompt", "The gate", "--expert-budget", "0.25"]
    assert cli.main([*command, "--prefetch", "psychic"]) == 2
    assert "no predictor is called 'psychic'" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert cli.main([*command, "--prefetch", "next_gate"]) == 2
        assert "nothing to save on cpu" in capsys.readouterr().err
        assert cli.main([*command, "--cpu-experts"]) == 2
        assert "cpu=True (--cpu-experts) has nothing to save" in capsys.readouterr().err
        assert cli.main([*command, "--no-pack"]) == 2
        assert "pack=False (--no-pack) has nothing to save" in capsys.readouterr().err
        for verb in (command, ["serve", str(model_folder)]):
            assert cli.main([*verb, "--graphs"]) == 2
            assert "graphs=True (--graphs) captures decode steps" in capsys.readouterr().err


def test_the_command_samples_as_it_is_told(model_folder, capsys):
    def run(*options):
        arguments = ["generate", str(model_folder), "--prompt", "The gate", "--max-new-tokens", "8", *options]
        status = cli.main(arguments)
        printed = capsys.readouterr()
        return status, printed.out.rpartition("experts: ")[0].removesuffix("\n"), printed.err

    drawn = ("--temperature", "1.5", "--top-k", "40", "--top-p", "0.95", "--min-p", "0.01", "--seed", "4")
    settings = {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "seed": 4}
    (expected,) = LLM(model_folder).generate(["The gate"], 8, **settings)
    assert run(*drawn)[:2] == (0, expected.text)
    assert run()[1] != expected.text
    stop = expected.text[3:5]
    assert run(*drawn, "--stop", stop, "--kv-tokens", "64")[1] == expected.text[: expected.text.index(stop)]
    assert run("--top-p", "0.5")[::2] == (
        2, "planaria generate: top_p changes nothing at temperature 0; give a temperature above 0, as 0.8\n"
    )  # fmt: skip
    assert "top_p=1.5 is out of range" in run("--temperature", "1", "--top-p", "1.5")[2]
    assert (
        "can never fit the key-value cache, which holds 16 tokens"
        in run("--kv-tokens", "8", "--max-new-tokens", "30")[2]
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("budget", BUDGETS)
def test_greedy_tokens_on_a_gpu(model_folder, prompts, huggingface_tokens, budget):
    model = AutoModelForCausalLM.from_pretrained(model_folder, experts_implementation="eager").cuda()
    llm = LLM(model_folder, expert_budget=budget, poison=True)
    assert llm.device.type == "cuda"
    assert llm.cache.gate_up_C2IH.is_cuda
    tokens = huggingface_tokens(model, prompts[:4], 32)
    assert [g.token_ids for g in llm.generate(prompts[:4], 32)] == tokens


def test_sizes_that_are_no_whole_numbers_are_refused():
    with pytest.raises(InferenceError, match=r"max_new_tokens=2\.5 is no whole number"):
        Request("a", (1,), max_new_tokens=2.5)


def test_generations_have_the_log_probabilities_that_were_asked_for(model_folder, prompts):
    with LLM(model_folder) as llm:
        (plain,), (told,) = (llm.generate([prompts[0]], 3, logprobs=n) for n in (None, 2))
    assert plain.logprobs == ()
    assert [each.token_id for each in told.logprobs] == list(told.token_ids)
    assert all(len(each.top) == 2 for each in told.logprobs)


def test_a_stop_string_that_is_a_special_token_ends_with_it(model_folder, prompts):
    """Decoding leaves special tokens out, so its text never comes."""
    with LLM(model_folder) as llm:
        token = llm.generate([prompts[0]], 4)[0].token_ids[1]
        llm.engine._special = {"<|end|>": token}
        llm.engine._decode = lambda ids: ""
        llm.engine.limits = dataclasses.replace(llm.engine.limits, has_tokenizer=True)
        (found,) = llm.generate([prompts[0]], 4, stop=("<|end|>",))
    assert (found.finish, found.token_ids[-1]) == ("stop", token)


def test_arguments_of_wrong_types_are_refused_in_a_sentence(model_folder):
    for wrong, said in (
        ({"expert_budget": "0.25"}, "expert budget '0.25' is out of range"),
        ({"device": "nope"}, "device='nope' is no device; give cpu or cuda"),
        ({"device": f"cuda:{torch.cuda.device_count()}"}, "CUDA GPUs here"),
    ):
        with pytest.raises(InferenceError, match=said):
            LLM(model_folder, **wrong)
    llm = LLM(model_folder, device="cpu")
    with pytest.raises(InferenceError, match="no tokens; give at least one"):
        llm.logits([])
    for prompts in ([[1.7, 2]], [5]):
        with pytest.raises(InferenceError, match="neither text nor token ids"):
            llm.generate(prompts, 1)
    with pytest.raises(InferenceError, match="seed='a' is of a wrong type"):
        llm.generate([[1, 2]], 1, seed="a")
    assert len(llm.generate([[1, 2]], 1, temperature=1.0, seed=None)[0].token_ids) == 1
