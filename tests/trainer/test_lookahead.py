"""Heads distilled from a model's routing, and held-out routing recorded, by the commands."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from inference.foresight import HORIZONS
from inference.heads import FOLDER, WEIGHTS, load_heads
from inference.simulate import read_routing
from trainer.cli import main
from trainer.lookahead import Reading, Settings, distil, judge, targets
from trainer.tokenizer import byte_tokenizer, save_tokenizer, train_bpe

RECIPE = """
model: {{family: qwen3_moe, hidden_size: 32, num_hidden_layers: 3, num_attention_heads: 2, num_key_value_heads: 1,
        num_experts: 8, num_experts_per_tok: 2, moe_intermediate_size: 16}}
data:
  source: files
  include: ["{texts}/*.txt"]
  tokenizer: {{kind: bytes}}
  sequence_length: 32
  heldout_fraction: 0.3
parallel: {{workers: 1, ep: 1, zero: 1}}
train: {{steps: 1, global_batch_size: 1, micro_batch_size: 1, lr: 1e-3}}
log: {{dir: {runs}, run: tiny}}
"""


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(run's folder, exported folder) of a model that never trained: its routing is as good as any."""
    root = tmp_path_factory.mktemp("lookahead")
    texts, run_dir, out = root / "texts", root / "runs" / "tiny", root / "export"
    texts.mkdir()
    run_dir.mkdir(parents=True)
    words = np.random.default_rng(0)
    for i in range(6):
        text = " ".join(str(n) for n in words.integers(0, 50, 400))
        (texts / f"{i}.txt").write_text(text)
    (run_dir / "recipe.yaml").write_text(RECIPE.format(texts=texts, runs=root / "runs"))
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        moe_intermediate_size=16,
        num_experts=8,
        num_experts_per_tok=2,
        vocab_size=257,
        initializer_range=0.2,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(out)
    save_tokenizer(byte_tokenizer(), out)
    return run_dir, out


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), row=st.integers(0, 2))
def test_targets_are_what_the_next_turns_used(seed, row):
    used = torch.rand(2, 9, 3, 4, generator=torch.Generator().manual_seed(seed)) < 0.4
    found = targets(used, row)
    assert found.shape == (2, 9 - max(HORIZONS), 2, 3, 4)
    for n, p, target, expert in np.ndindex(2, 9 - max(HORIZONS), 3, 4):
        first = p if target > row else p + 1
        for i, horizon in enumerate(HORIZONS):
            wanted = any(used[n, turn, target, expert] for turn in range(first, first + horizon))
            assert bool(found[n, p, i, target, expert]) == wanted


def foreseeable(seed=0):
    """Hidden states of which eight numbers name the expert of the layer below, and eight that of the next token."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, 8, (24, 32, 2, 1), generator=generator)
    x = 0.1 * torch.randn(24, 32, 2, 24, generator=generator)
    for row in range(2):
        below = index[:, :, min(row + 1, 1), 0]
        x[:, :, row, :8] += torch.nn.functional.one_hot(below, 8)
        x[:, :-1, row, 8:16] += torch.nn.functional.one_hot(index[:, 1:, row, 0], 8)
    return Reading(x, index, 8)


def test_heads_learn_what_the_input_tells_and_the_same_twice():
    how = Settings(epochs=30, rank=16, lr=1e-2)
    first, second = distil(foreseeable(), how), distil(foreseeable(), how)
    assert torch.equal(first.outward_LRO, second.outward_LRO)
    assert torch.equal(first.inward_LHR, second.inward_LHR)
    assert not torch.equal(first.inward_LHR, distil(foreseeable(), Settings(30, 16, 30, 1e-2, seed=1)).inward_LHR)
    report = judge(first, foreseeable(seed=5))
    assert report["next_layer"] > 0.95
    assert report["next_token"] > 0.95
    assert report["same_as_last"] < 0.3


def test_the_commands_make_heads_and_a_trace_that_simulate_reads(run, tmp_path, capsys):
    run_dir, out = run
    train = ["lookahead", "train", str(run_dir), str(out), "--tokens", "512", "--rank", "8", "--epochs", "2"]
    assert main(train) == 0
    assert "recall on" in capsys.readouterr().out
    weights = (out / FOLDER / WEIGHTS).read_bytes()
    heads, manifest = load_heads(out)
    assert (heads.layers, heads.rank, manifest.training["tokens"]) == (3, 8, 512)
    assert main(train) == 0
    assert (out / FOLDER / WEIGHTS).read_bytes() == weights

    trace = tmp_path / "heldout.trace"
    assert main(["lookahead", "record", str(run_dir), str(out), str(trace), "--tokens", "128"]) == 0
    routing = read_routing(trace)
    assert routing.index_TLK.shape == (128, 3, 2)
    assert sorted(routing.starts) == [0, 32, 64, 96]
    assert routing.passes is None
    assert routing.heads is not None
    capsys.readouterr()
    assert main(["simulate", str(trace), "--budgets", "0.5"]) == 0
    assert "foreseen_reuse" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("swap", "said"), [((0, "nowhere"), "holds no recipe.yaml"), ((1, "nowhere"), "holds no config.json")]
)
def test_a_wrong_folder_is_a_users_mistake(run, swap, said, capsys):
    folders = [str(folder) for folder in run]
    folders[swap[0]] = swap[1]
    assert main(["lookahead", "train", *folders]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("tokens", [None, 300])
@pytest.mark.parametrize("verb", ["train", "record"])
def test_the_export_of_another_run_is_refused_before_it_reads(run, tmp_path, capsys, verb, tokens):
    """Its tokens are others: ids beyond its embedding, or text cut as it never was."""
    out = tmp_path / "export"
    shutil.copytree(run[1], out, ignore=shutil.ignore_patterns("tokenizer*"))
    if tokens is not None:
        save_tokenizer(train_bpe(["some text of another run"], tokens), out)
    trace = [str(tmp_path / "t")] if verb == "record" else []
    assert main(["lookahead", verb, str(run[0]), str(out), *trace]) == 2
    assert "give the run that it was exported from" in capsys.readouterr().err
