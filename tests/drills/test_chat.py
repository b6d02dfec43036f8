"""Chat fine-tuning as a user runs it: packed samples, a kill, other layouts of workers, the best step's export."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpointing.store import list_checkpoints
from trainer import data, export
from trainer.data import batch_ids, sample_order
from trainer.drill import judge
from trainer.export import ExportError
from trainer.faults import KillSpec

pytestmark = [pytest.mark.drill, pytest.mark.slow]
CHAT = Path(__file__).parent / "chat.yaml"


@pytest.fixture(scope="module")
def rows(folder):
    """Samples of very different lengths, so that micro-batches have different numbers of answer tokens."""
    path, choose = folder / "chat.jsonl", random.Random(5)
    lines = []
    for i in range(60):
        task = choose.choice(["upper", "reverse"])
        word = "".join(choose.choices("abcdefgh", k=choose.randint(1, 20)))
        answer = word.upper() if task == "upper" else word[::-1]
        messages = [{"role": "user", "content": f"{task} {word}"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages, "task": task, "id": i}))
    path.write_text("\n".join(lines))
    return f"data.include=[{path}]"


@pytest.fixture(scope="module")
def undisturbed_chat(start, rows):
    job = start("chat", [rows], recipe=CHAT)
    return job, job.finish()


def test_a_kill_costs_no_bit_and_at_most_one_step(start, rows, undisturbed_chat):
    """The kill in step 9's forward pass follows the evaluation of step 8, to which the run comes back."""
    kill = KillSpec(1, 9, "forward")
    job = start("chat-killed", [rows], recipe=CHAT, kill=str(kill))
    events = job.finish()
    verdict = judge(job.recipe, kill, undisturbed_chat[1], events)
    assert verdict.passed, verdict.problems
    assert verdict.steps_lost <= 1
    assert verdict.tier == "memory"
    undisturbed = {row["step"]: row["loss"] for row in undisturbed_chat[1] if row["kind"] == "heldout"}
    assert {row["step"]: row["loss"] for row in events if row["kind"] == "heldout"} == undisturbed
    assert undisturbed.keys() == {0, 4, 8, 12}


def tokens_of_step(job, step):
    """Tokens of the step's global batch that are no padding."""
    rows, train = data.load(job.recipe, rank=1).train, job.recipe.train
    ids = batch_ids(step, 0, 0, 1, train.global_batch_size, train.global_batch_size)
    return sum(int(rows[sample_order(i, len(rows), train.seed)].mask_S.sum()) for i in ids)


def test_what_was_found_is_printed_and_in_the_events(undisturbed_chat):
    job, events = undisturbed_chat
    (found,) = [row for row in events if row["kind"] == "data"]
    assert (found["layout"], found["tasks"], found["unread_keys"]) == ("messages", ["reverse", "upper"], ["id"])
    assert found["train"]["samples"] > found["train"]["sequences"], "several samples share a row"
    text = job.output.read_text()
    assert "layout messages" in text
    assert 'tasks 0 "reverse", 1 "upper"' in text
    counted = next(row for row in events if row["kind"] == "routing")["tokens"]
    real = tokens_of_step(job, 1)
    assert [sum(layer) for layer in counted] == [2 * real] * 2, "padding is routed and not counted"
    steps = [row for row in events if row["kind"] == "step"]
    assert all(row["label_tokens"] > 0 for row in steps)
    assert len({row["label_tokens"] for row in steps}) > 1


def test_the_loss_does_not_depend_on_workers_or_micro_batches(start, rows):
    same = [rows, "model.attention_dropout=0.0", "model.router_aux_loss_coef=0.0", "train.steps=4"]
    one = start("chat-one", [*same, "parallel.workers=1", "parallel.ep=1", "train.micro_batch_size=8"], recipe=CHAT)
    two = start("chat-two", [*same, "train.micro_batch_size=1"], recipe=CHAT)
    losses = [[row["loss"] for row in job.finish() if row["kind"] in ("step", "heldout")] for job in (one, two)]
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)


def test_the_best_step_outlives_retention_and_is_exported(start, rows, tmp_path, capsys):
    """A learning rate that ruins what the first steps have learnt; retention keeps one checkpoint besides the best."""
    ruin = [
        "train.lr=3.0",
        "train.beta2=0.5",
        "train.schedule=constant",
        "train.warmup_steps=0",
        "train.max_grad_norm=0",
    ]
    job = start("chat-ruined", [rows, *ruin, "checkpoint.disk.every=2", "train.eval_every=2"], recipe=CHAT)
    losses = {row["step"]: row["loss"] for row in job.finish() if row["kind"] == "heldout"}
    steps = [step for step, _ in list_checkpoints(job.run_dir / "checkpoints")]
    best = min((losses[step], step) for step in losses if step)[1]
    assert best < 10, f"this run was to get worse: {losses}"
    assert steps == [best, 12]
    assert export.main(str(job.run_dir), str(tmp_path / "best"), step="best") == 0
    assert f"step {best} has the lowest held-out loss" in capsys.readouterr().out
    assert export.main(str(job.run_dir), str(tmp_path / "last")) == 0
    weights = [AutoModelForCausalLM.from_pretrained(tmp_path / name).lm_head.weight for name in ("best", "last")]
    assert not torch.equal(*weights)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "best")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert asked == "User:\nhi\nAssistant:\n"
    (job.run_dir / "heldout.json").unlink()
    with pytest.raises(ExportError, match=rf"none of its checkpoints \(steps {best}, 12\) has a held-out loss"):
        export.main(str(job.run_dir), str(tmp_path / "none"), step="best")
