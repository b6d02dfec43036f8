"""Two workers record where they route; a second run that follows the trace ends with the same bits."""

import pytest

from moe.tracefile import TraceError, read_trace
from tests.forked import planaria
from trainer.events import read_events
from trainer.recipe import load_recipe, recipe_fingerprint
from trainer.routing_trace import open_tape

RECIPE = """
model: {family: qwen3_moe, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1,
        moe_intermediate_size: 16, num_experts: 8, num_experts_per_tok: 2, router_aux_loss_coef: 0.01}
data: {source: stdlib, include: ["json/*.py"], tokenizer: {kind: bytes}, sequence_length: 32}
parallel: {workers: 2, ep: 2}
train: {steps: 4, global_batch_size: 8, micro_batch_size: 2, lr: 3e-3}
checkpoint: {linger_s: 0}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE + f"log: {{dir: {tmp_path / 'runs'}, every: 2}}\n")
    return path


def train(recipe, *overrides):
    log = recipe.with_suffix(".log")
    with log.open("wb") as output:
        status = planaria("train", recipe, *overrides, output=output.fileno()).wait(timeout=120)
    assert status == 0, log.read_text()[-4000:]
    return log.read_text()


@pytest.mark.slow
def test_a_run_that_follows_a_trace_ends_with_the_recorded_runs_bits(recipe, tmp_path):
    runs = tmp_path / "runs"
    train(recipe, "log.run=a", "log.routing_trace=true")
    train(recipe, "log.run=b", "log.routing_trace=true", f"train.replay_trace={runs / 'a'}")
    told = train(recipe, "log.run=c", "train.replay_trace=balanced")
    hashes = [next(row["state_hash"] for row in read_events(runs / run) if row["kind"] == "done") for run in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]
    for rank in range(2):
        first, second = ((runs / run / "trace" / f"rank-000{rank}.trace").read_bytes() for run in "ab")
        assert first == second
        records = list(read_trace(runs / "a" / "trace" / f"rank-000{rank}.trace"))
        assert [(r.step, r.micro, r.layer) for r in records] == [
            (step, micro, layer) for step in range(1, 5) for micro in range(2) for layer in range(2)
        ]
        assert all(r.index_TK.shape == (64, 2) for r in records)
    rows = [row for row in read_events(runs / "a") if row["kind"] == "routing"]
    assert [(row["rank"], row["step"], row["layers"]) for row in rows] == [
        (0, 1, [0, 1]),
        (0, 2, [0, 1]),
        (0, 4, [0, 1]),
    ]
    # Tokens of both ranks and both micro-batches, of one, one and two steps.
    assert [[sum(layer) for layer in row["tokens"]] for row in rows] == [[512, 512], [512, 512], [1024, 1024]]
    assert "busiest expert 1.0x, load CV 0.00" in told


def test_recording_may_change_in_a_resume_and_following_may_not(recipe):
    plain = recipe_fingerprint(load_recipe(recipe))
    assert recipe_fingerprint(load_recipe(recipe, ["log.routing_trace=true"])) == plain
    assert recipe_fingerprint(load_recipe(recipe, ["train.replay_trace=balanced"])) != plain


def test_a_trace_that_is_not_there_is_said(recipe, tmp_path):
    class Block:
        layer, experts = 0, type("E", (), {"num_experts": 8})

    config = type("C", (), {"model_type": "qwen3_moe", "num_experts_per_tok": 2})
    process = type("P", (), {"rank": 1, "world": 2, "device": None})
    with pytest.raises(TraceError, match="has no routing trace of rank 1 "):
        open_tape(load_recipe(recipe, ["train.replay_trace=/no"]), process, tmp_path, config, [Block])
    with pytest.raises(TraceError, match="routes no tokens"):
        open_tape(load_recipe(recipe, ["log.routing_trace=true"]), process, tmp_path, config, [])
