"""The report: figures from counts, and advice for what they show."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from inference.costmodel import named_profile
from inference.engine import LLM
from inference.errors import InferenceError
from inference.offload import Crossing
from inference.placement import ModelSizes
from inference.report import Measured, Report
from inference.transfer import SimulatedLink
from tests.inference.test_hybrid import EVEN
from trainer.cli import main

H200 = named_profile("h200")
SIZES = ModelSizes(
    family="qwen3_moe",
    dtype="bfloat16",
    layers=24,
    moe_layers=24,
    experts=64,
    top_k=8,
    hidden=2048,
    intermediate=1024,
    expert_bytes=12_582_912,
    dense_bytes=1_000_000_000,
    table_bytes=200_000_000,
    kv_bytes=98_304,
)
TOKEN = 24 * 8  # experts
RUN = Measured(
    seconds=1.0,
    new_tokens=50,
    rows=50,
    passes=50,
    slots=400,
    hits=50 * TOKEN // 2,
    misses=50 * TOKEN // 4,
    cpu_experts=50 * TOKEN // 4,
    fetched_bytes=50 * TOKEN // 4 * SIZES.expert_bytes,
)


def report(**changes):
    return Report.of(dataclasses.replace(RUN, **changes), SIZES, H200)


def test_the_floor_is_what_the_lanes_take_for_these_hits():
    floor = report().floor
    missed = 50 * TOKEN // 2 * SIZES.expert_bytes
    assert floor.host_s == pytest.approx(missed / (50.8e9 + 82.1e9))
    assert floor.link_s == pytest.approx(missed / 2 / 55.3e9)
    assert floor.gpu_s == pytest.approx((50 * 0.8e9 + 50 * TOKEN * 3 // 4 * SIZES.expert_bytes) / 3.84e12)
    assert floor.bound == "the link"
    assert report().share == pytest.approx(floor.seconds)
    assert report().measured.hit_rate == 0.5


def test_without_a_gpu_everything_is_read_from_host_memory_once():
    laptop = dataclasses.replace(H200, link=None, fill=5e9, gpu=(), gpu_memory=0.0, gpu_flops=0.0)
    run = dataclasses.replace(RUN, cpu_experts=0, hits=50 * TOKEN // 2, misses=50 * TOKEN // 2)
    found = Report.of(run, SIZES, laptop)
    assert found.floor.host_s == pytest.approx((50 * 0.8e9 + 50 * TOKEN * SIZES.expert_bytes) / 91e9)
    assert "waits" not in str(found)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"slots": 20}, "an expert budget of 0.12 holds one token's"),
        ({"hits": 100}, "most experts are missing"),
        ({"stall_s": 0.4, "cpu_experts": 0}, "40% of the time: let the CPU compute"),
        ({"stall_s": 0.4}, "only fewer misses or prefetch"),
        ({"prefetched": 10, "wasted": 6}, "6 of 10 prefetched"),
        ({}, "16 sequences at once would read"),
        ({"seconds": 0.7}, "the machine is the limit (the link)"),
        ({"seconds": 60.0}, "issuing operations"),
    ],
)
def test_what_stands_out_is_said(changes, said):
    assert any(said in sentence for sentence in report(**changes).advice())
    calm = report(passes=5, seconds=1.2).advice()
    assert not any(said in sentence for sentence in calm), "and only then"


def test_where_nothing_stands_out_that_is_said():
    assert report(passes=5, seconds=1.2).advice() == ["nothing stands out"]


def test_it_is_printed_with_every_figure():
    text = str(report(ways={"split": 3, "fetch": 1}, newest_plan="split: ...", prefetched=9, wasted=1, stall_s=0.1))
    for part in ("50 new tokens in 1.00 s, 50.0 tokens/s", "1.0 rows in each of 50 passes", "50.0% hits",
                 "30.2 GB fetched", "604 MB for each row", "9 experts, 1 of them in vain", "10% of the time",
                 "split 75%, fetch 25%; the last: split: ...", "floor: 0.546 s by the link; 55%", "change: ",
    ):  # fmt: skip
        assert part in text, (part, text)
    assert str(report(rows=0, passes=0, seconds=0.0, new_tokens=0)) == "nothing has been computed yet"
    assert report(rows=0, passes=0, seconds=0.0, new_tokens=0).share == 0.0


def test_a_model_reports_what_it_counted(model_folder, prompts):
    llm = LLM(model_folder, expert_budget=0.1, device="cpu")
    laptop = dataclasses.replace(H200, link=None, fill=5e9, gpu=(), gpu_memory=0.0, gpu_flops=0.0)
    assert str(llm.report(laptop)) == "nothing has been computed yet"
    llm.generate(prompts[:2], 4)
    found, stats = llm.report(laptop), llm.stats()
    assert (found.measured.hits, found.measured.misses) == (stats.hits, stats.misses)
    assert found.measured.new_tokens == 8
    assert found.measured.slots == 6
    assert 0 < found.share < 1
    assert found.sizes.experts == 16


def test_what_crossed_a_link_is_reported(model_folder, prompts):
    link = SimulatedLink(rate=5e7)
    llm = LLM(model_folder, 0.25, device="cpu", crossing=Crossing("same_as_last", link=link))
    llm.generate(prompts[:2], 12)
    found, moved = llm.report(H200), llm.executor.transfers.counts
    assert found.measured.fetched_bytes == moved.demanded_bytes + moved.prefetched_bytes > 0
    assert found.measured.stall_s == link.stall_s > 0
    stats = llm.stats()
    assert stats.bytes_fetched == found.measured.fetched_bytes > stats.misses * llm.cache.store.bytes_per_expert
    assert f"{stats.bytes_fetched / 1e6:.1f} MB fetched, {found.measured.prefetched} experts ahead, " in str(stats)
    assert found.measured.prefetched >= found.measured.wasted
    assert found.measured.prefetched > 0
    assert "prefetch: " in str(found)
    assert found.floor.link_s == pytest.approx(found.measured.fetched_bytes / 55.3e9)


def test_what_the_cpu_computed_beside_the_link_is_reported(model_folder, prompts):
    llm = LLM(model_folder, 0.1, device="cpu", crossing=Crossing(cpu=True, profile=EVEN, link=SimulatedLink(rate=5e7)))
    llm.generate(prompts[:2], 8)
    found = llm.report(EVEN)
    assert found.measured.cpu_experts == llm.cache.counts.computed > 0
    assert sum(found.measured.ways.values()) > 4 * 7, "a plan for each layer and token"
    assert "layer calls: " in str(found)
    assert "the last: split: link" in str(found)


def test_the_cpu_lane_is_asked_for_by_name(model_folder, capsys):
    """Without a GPU there is nothing to be beside: that is said, not passed over."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["generate", str(model_folder), "--prompt", "def", "--cpu-experts"]) == 2
    assert "nothing to save on cpu" in capsys.readouterr().err


def test_generate_prints_the_report_when_asked(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = ["--prompt", "def", "--max-new-tokens", "3", "--expert-budget", "0.25", "--report"]
    assert main(["generate", str(model_folder), *options]) == 0
    text = capsys.readouterr().out
    assert "floor: " in text
    assert "change: " in text
    assert "no GPU" in text or "cores of" in text


def test_a_dense_model_has_nothing_to_report(dense_folder):
    with pytest.raises(InferenceError, match="dense model"):
        LLM(dense_folder, device="cpu").report()


@pytest.fixture
def dense_folder(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path
