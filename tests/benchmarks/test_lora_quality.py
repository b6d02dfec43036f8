"""The quality benchmark: its tasks, its scoring, its sizes, and a miniature run."""

import json
import math
import statistics
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from benchmarks import lora_quality
from benchmarks import lora_quality_base as bases
from benchmarks.lora_quality_arms import ARMS, TOLERANCE, LoraPerTask, fitted, put_on, reference_size
from benchmarks.lora_quality_base import BaseSetting, answer_loss, frozen_base, new_model, solved
from benchmarks.lora_quality_probe import task_known
from benchmarks.lora_quality_report import closed, plot, summarise, table, verdict
from benchmarks.lora_quality_run import TrainSetting, context_of, mutual_information, train_arm
from benchmarks.lora_quality_tasks import BLANK, BOS, END, FUNCTIONS, LENGTH, NEW, OLD, SEP, SYMBOLS, TaskSet, learnt
from moe.context import batch_context

SMALL = BaseSetting(hidden=32, intermediate=64, layers=2, heads=2, stages=((1, 3),), batch=8)
words = st.lists(st.integers(0, SYMBOLS - 1), min_size=LENGTH, max_size=LENGTH)


def slowly(name, word):
    """The functions again, one symbol at a time."""
    if name == "copy":
        return list(word)
    if name == "rot":
        return [(s + 3) % SYMBOLS for s in word]
    if name == "reverse":
        return [word[LENGTH - 1 - i] for i in range(LENGTH)]
    if name == "sort":
        return sorted(word)
    if name == "dedupe":
        kept = list(dict.fromkeys(word))
        return kept + [BLANK] * (LENGTH - len(kept))
    if name == "prefix sum":
        return [sum(word[: i + 1]) % SYMBOLS for i in range(LENGTH)]
    if name == "depth":
        depth, found = 0, []
        for s in word:
            depth = depth + 1 if s < SYMBOLS // 2 else max(depth - 1, 0)
            found.append(depth)
        return found
    assert name == "lookup"
    return [word[(word.index(s) + 1) % LENGTH] for s in word]


@given(word=words)
@settings(max_examples=60, deadline=None)
def test_functions_do_what_their_names_say(word):
    for name, function in FUNCTIONS.items():
        assert function(torch.tensor([word]))[0].tolist() == slowly(name, word), name
    for task in NEW:
        want = [s if s == BLANK else (s + task.shift) % SYMBOLS for s in slowly(task.name, word)]
        assert task(torch.tensor([word]))[0].tolist() == want


@given(seed=st.integers(0, 10**6), examples=st.integers(1, 3), shown=st.sampled_from(["old", "new"]))
@settings(max_examples=15, deadline=None)
def test_samples_are_what_they_claim_and_name_no_task(seed, examples, shown):
    tasks = learnt(examples, shown)
    batch = tasks.batch(16, seed)
    assert torch.equal(batch.tokens_BS, tasks.batch(16, seed).tokens_BS)
    for tokens, scored, task in zip(batch.tokens_BS, batch.scored_BS, batch.task_B.tolist(), strict=True):
        rows = tokens.view(examples + 1, 2 * LENGTH + 2)
        assert rows[:, 0].tolist() == [BOS] + [END] * examples
        assert (rows[:, LENGTH + 1] == SEP).all()
        x, y = rows[:, 1 : LENGTH + 1], rows[:, LENGTH + 2 :]
        assert torch.equal(y[-1:], NEW[task](x[-1:]))
        which = OLD if shown == "old" else NEW
        agreeing = [t for t in range(8) if torch.equal(which[t](x[:-1]), y[:-1])]
        assert agreeing == [task], "the examples do not tell the task"
        first = examples if shown == "old" else 1
        assert scored.view_as(rows)[first:, -LENGTH:].all()
        assert int(scored.sum()) == LENGTH * (examples + 1 - first)


def test_tasks_conflict_on_the_same_word():
    word = torch.tensor([[3, 1, 3, 8]])
    assert len({tuple(task(word)[0].tolist()) for task in NEW}) == len(NEW) == 8
    assert {task.shift for task in OLD} == {0}
    assert not set(NEW) & set(OLD)


def test_scoring_equals_greedy_decoding():
    torch.manual_seed(0)
    model = new_model(replace(SMALL, seed=1))
    tasks = TaskSet(OLD, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(40):  # until some answers are right and some wrong
        optimizer.zero_grad()
        answer_loss(model, tasks.batch(32, step)).backward()
        optimizer.step()
    batch = tasks.batch(64, 10**6)
    prompt = batch.tokens_BS[:, :-LENGTH]
    written = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=LENGTH, pad_token_id=END
    )
    exact = (written[:, -LENGTH:] == batch.tokens_BS[:, -LENGTH:]).all(1)
    assert 0 < int(exact.sum()) < 64
    assert torch.equal(solved(model, batch), exact)


def test_all_arms_have_as_many_trainable_parameters():
    base = new_model(BaseSetting()).requires_grad_(False)
    size = reference_size(base)
    for arm in ARMS.values():
        banks, count = fitted(base, arm, size)
        assert abs(count / (size * arm.share) - 1) <= TOLERANCE, arm.name
        model = bases.twin(base)
        put_on(model, arm, banks, 8, seed=0)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trainable == count * (8 if arm.oracle else 1), arm.name
        assert not any(p.requires_grad for name, p in base.named_parameters())


def test_adapters_of_the_oracle_share_nothing():
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 5, bias=False).requires_grad_(False)
    adapted = LoraPerTask(linear, 4, 3, 0.5, "x")
    with torch.no_grad():
        adapted.B.normal_()
    x = torch.randn(8, 2, 6)
    y = adapted(x)
    for row in range(8):
        g = row // 2
        assert torch.allclose(y[row], x[row] @ (linear.weight + 0.5 * adapted.B[g] @ adapted.A[g]).T, atol=1e-6)
    y[2:4].sum().backward()
    assert [bool(g.any()) for g in adapted.B.grad] == [False, True, False, False]


def test_the_base_is_made_once_and_again_for_other_causes(tmp_path, monkeypatch):
    device = torch.device("cpu")
    made = []
    pretrain = bases._pretrain
    monkeypatch.setattr(bases, "_pretrain", lambda *a: made.append(a[1]) or pretrain(*a))
    monkeypatch.setattr(bases, "key_of", lambda setting, device: f"{setting.stages[0][1]}")
    first, facts = frozen_base(SMALL, tmp_path, device)
    again, same = frozen_base(SMALL, tmp_path, device)
    assert len(made) == 1
    assert facts == same
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not any(p.requires_grad for p in again.parameters())
    next(tmp_path.glob("*.json")).unlink()  # a death between the two files leaves this
    frozen_base(SMALL, tmp_path, device)
    assert len(made) == 2
    frozen_base(replace(SMALL, stages=((1, 4),)), tmp_path, device)
    assert [setting.stages[0][1] for setting in made] == [3, 3, 4]


def test_the_key_follows_every_cause(monkeypatch):
    cpu = torch.device("cpu")
    keys = {
        bases.key_of(SMALL, cpu),
        bases.key_of(replace(SMALL, seed=2), cpu),
        bases.key_of(SMALL, torch.device("cuda")),
    }
    monkeypatch.setattr(torch, "__version__", "0")
    assert len(keys | {bases.key_of(SMALL, cpu)}) == 4


def test_training_changes_adapters_only_and_is_repeatable():
    base = new_model(SMALL).requires_grad_(False)
    before = {name: t.clone() for name, t in base.state_dict().items()}
    arm = ARMS["mola"]
    banks, _ = fitted(base, replace(arm, banks={n: replace(b, num_experts=2) for n, b in arm.banks.items()}), 9000)
    setting = TrainSetting(steps=3, batch=8, held_out=2)
    one, two = (train_arm(base, arm, banks, setting, 1e-2, seed=3) for _ in range(2))
    other = train_arm(base, arm, banks, setting, 1e-2, seed=4)
    assert one["loss"] == two["loss"] != other["loss"]
    assert all(torch.equal(before[name], t) for name, t in base.state_dict().items())
    assert one["routing"]["experts"] == 2 * 2 * 7
    assert one["mean"] == pytest.approx(statistics.fmean(one["exact"].values()))


def test_the_probe_finds_the_task_where_it_is():
    base = new_model(SMALL).requires_grad_(False)
    tasks = learnt(1, "old")
    before = task_known(base, tasks, samples=24)
    assert set(before) == {
        f"model.layers.{layer}.{part}"
        for layer in range(2)
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    }
    assert before["model.layers.0.self_attn.q_proj"] < 0.35, "a token alone does not tell"

    def tell(module, args, output):  # the first layer's attention writes the task into the hidden state
        return (output[0] + 50 * F.one_hot(torch.arange(8).repeat_interleave(24), 32)[:, None].float(), *output[1:])

    base.model.layers[0].self_attn.register_forward_hook(tell)
    after = task_known(base, tasks, samples=24)
    assert after["model.layers.0.self_attn.q_proj"] == before["model.layers.0.self_attn.q_proj"]
    assert after["model.layers.0.mlp.gate_proj"] == 1
    assert after["model.layers.1.self_attn.q_proj"] == 1


def test_only_routed_presets_count_as_such():
    groups = {name: lora_quality.facts_of(arm, 1, 0.1)["group"] for name, arm in ARMS.items()}
    assert {name for name, group in groups.items() if group == "bound"} == {
        "lora",
        "one lora per task",
        "one lora per task, 8x",
    }
    assert groups["moelora-task"] == "task"
    assert {groups[name] for name in ("rslora", "moslora", "lora, 8x", "lora, last layer")} == {"plain"}
    assert {groups[name] for name in ("mola", "loramoe", "mixlora", "hydralora", "adamole", "mov")} == {"routed"}
    assert groups["loramoe, last layer"] == "variant"


def test_contexts_tell_tokens_their_task():
    batch = learnt(1, "old").batch(8, 0)
    context = context_of(batch, balance=True)
    rows, length = context.shape
    assert (rows, length) == (8, batch.tokens_BS.shape[1] - 1)
    assert context.task_T.view(rows, length)[:, 0].tolist() == list(range(8))
    with batch_context(context):
        pass


def test_mutual_information():
    assert mutual_information(torch.eye(8)) == pytest.approx(3)
    assert mutual_information(torch.ones(8, 4)) == pytest.approx(0, abs=1e-12)
    assert mutual_information(torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]])) == pytest.approx(1)


def _run(arm, seed, mean, routing=None):
    return {
        "arm": arm,
        "seed": seed,
        "mean": mean,
        "worst": mean / 2,
        "exact": {"copy": mean},
        "routing": routing or {},
    }


def test_gaps_are_closed_seed_by_seed():
    routing = {"information": 1.5, "most_information": 2.0, "dead": 1, "experts": 8}
    runs = {
        "lora": [_run("lora", 0, 0.4), _run("lora", 1, 0.5)],
        "one lora per task": [_run("o", 0, 0.8), _run("o", 1, 0.9)],
        "mola": [_run("mola", 0, 0.7, routing), _run("mola", 1, 0.86, routing)],
    }
    facts = {
        name: {"parameters": 10, "lr": 0.01, "kind": "", "group": "routed" if name == "mola" else "bound"}
        for name in runs
    }
    rows = summarise(runs)
    assert rows["mola"]["closed"] == pytest.approx([0.75, 0.9])
    assert rows["lora"]["closed"] == [0, 0]
    assert "mola closes 82 % of the gap; 70 % reached" in verdict(rows, facts)
    assert "| mola | 10 | 0.01 | 78.0 % (70.0 to 86.0) | 39.0 % | 82 % (75 to 90) |" in table(rows, facts)
    assert plot(rows, facts, "a < b").count("<circle") == 3
    assert "not reached" in verdict(summarise(runs | {"mola": [_run("mola", 0, 0.5)]}), facts)
    runs["lora, last layer"] = [_run("l", 0, 0.74), _run("l", 1, 0.74)]
    facts["lora, last layer"] = facts["lora"] | {"group": "plain"}
    said = verdict(summarise(runs), facts)
    assert "as published: mola closes 82 %" in said, "an arm without a router is no routed preset"
    assert "without a router, lora, last layer: 36 %" in said
    runs["lora"] = [_run("lora", 0, 0.4), _run("lora", 1, 0.95)]
    assert "train for longer" in verdict(summarise(runs), facts)
    assert math.isnan(closed(0.5, 0.9, 0.9))


@pytest.mark.timeout(60)
def test_a_miniature_run_writes_its_table_and_plot(tmp_path, monkeypatch, capsys):
    out = tmp_path / "quality.json"
    arguments = ["--presets", "moelora-task", "--seeds", "1", "--steps", "2", "--base-steps", "2", "--jobs", "1"]
    arguments += ["--held-out", "2", "--rates", "0.01", "0.02", "--lr", "lora=0.03", "moelora-task=0.01"]
    arguments += ["--cache", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["lora_quality", *arguments])
    lora_quality.main()
    result = json.loads(out.read_text())
    assert set(result["rows"]) == {"lora", "one lora per task", "moelora-task"}
    assert result["facts"]["moelora-task"]["group"] == "task"
    assert result["facts"]["lora"]["lr"] == 0.03
    assert [(run["arm"], run["lr"]) for run in result["tuning"]] == [("one lora per task", lr) for lr in (0.01, 0.02)]
    assert "verdict" in result
    assert len(result["task_known"]) == 16
    assert (tmp_path / "quality.svg").read_text().startswith("<svg")
    assert "gap closed" in capsys.readouterr().out
