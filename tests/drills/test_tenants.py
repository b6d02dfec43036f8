"""Several adapters in real runs: each ends as it does alone, a diverging one harms no other, kills change nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from inference.engine import LLM
from lora.format import apply_adapter, load_adapter
from lora.tenant_rules import alone
from trainer import export
from trainer.admission import AdmissionError
from trainer.drill import judge
from trainer.faults import KillSpec
from trainer.plan import admission
from trainer.plan_card import card

pytestmark = [pytest.mark.drill, pytest.mark.slow]
RECIPE = Path(__file__).parent / "tenants.yaml"
NO_DROPOUT = "adapter.experts={preset: expert-lora, r: 4, alpha: 8}"
ONE = "tenants={one: {lr: 2e-2, seed: 1, max_grad_norm: 0.01}}"


@pytest.fixture(scope="module")
def base(undisturbed, folder):
    out = folder / "tenants-base"
    assert export.main(str(folder / "undisturbed"), str(out)) == 0
    return out


@pytest.fixture(scope="module")
def begin(start, base):
    def begin_run(name, *overrides, **options):
        return start(name, [f"model.path={base}", *overrides], recipe=RECIPE, **options)

    return begin_run


@pytest.fixture(scope="module")
def together(begin):
    job = begin("together")
    return job, job.finish()


def factors(job):
    _, checkpoint = export.open_run(job.run_dir)
    return export.trained_tensors(checkpoint)


def assert_same(mine, theirs):
    assert mine
    assert mine.keys() == theirs.keys()
    for path, want in theirs.items():
        assert torch.equal(mine[path], want), path


def test_a_tenant_ends_to_the_bit_as_it_does_alone(begin, together):
    lone = begin("lone", ONE)
    rows = lone.finish()
    assert_same(alone(factors(together[0]), "one"), alone(factors(lone), "one"))
    for mine, theirs in zip(figures(together[1], "one"), figures(rows, "one"), strict=True):
        assert mine == theirs


def figures(rows, tenant):
    return [
        (r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in rows if r["kind"] == "tenant" and r["tenant"] == tenant
    ]


def test_a_tenant_trains_as_a_run_without_tenants_does(begin):
    """The ordinary adapter's own code, so equal but for the order of sums; clipped each step, there by DeepSpeed."""
    lone = begin("lone-plain", ONE, NO_DROPOUT)
    rows = lone.finish()
    plain = begin("plain", "tenants={}", NO_DROPOUT, "train.lr=2e-2", "train.seed=1", "train.max_grad_norm=0.01")
    theirs = [r for r in plain.finish() if r["kind"] == "step"]
    for (step, loss, norm, rate), row in zip(figures(rows, "one"), theirs, strict=True):
        assert (step, rate) == (row["step"], row["lr"])
        assert loss == pytest.approx(row["loss"], rel=1e-6)
        assert norm == pytest.approx(row["grad_norm"], rel=1e-4)
        assert norm > 0.01
    mine = alone(factors(lone), "one")
    for path, want in factors(plain).items():
        assert (mine[path] - want).norm() < 1e-5 * want.norm(), path


def test_chat_tenants_train_as_runs_without_tenants_do(begin, folder):
    """Each divides by the answer tokens of its own global batch."""
    choose, include = random.Random(3), {}
    for name, answer in (("upper", str.upper), ("reverse", lambda word: word[::-1])):
        words = ["".join(choose.choices("abcdefgh", k=choose.randint(1, 14))) for _ in range(60)]
        turns = [[("user", word), ("assistant", answer(word))] for word in words]
        lines = [json.dumps({"messages": [{"role": r, "content": c} for r, c in turn]}) for turn in turns]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        include[name] = f"include: [{folder / name}.jsonl]"
    own = "format: chat, chat_template: plain, heldout_fraction: 0.1, tokenizer: {kind: model}, sequence_length: 48"
    data = f"data={{source: files, {include['upper']}, {own}}}"
    both = f"tenants={{up: {{seed: 1}}, back: {{seed: 2, data: {{{include['reverse']}}}}}}}"
    two, plain = (
        begin("chats", data, both, NO_DROPOUT),
        begin("chat-plain", data, "tenants={}", NO_DROPOUT, "train.seed=1"),
    )
    rows = [r for r in plain.finish() if r["kind"] == "step"]
    for (_, loss, *_), row in zip(figures(two.finish(), "up"), rows, strict=True):
        assert loss == pytest.approx(row["loss"], rel=1e-6)
    mine = alone(factors(two), "up")
    for path, want in factors(plain).items():
        # AdamW divides by small second moments, which lets roundings grow; a wrong divisor would be far off.
        assert (mine[path] - want).norm() < 5e-5 * want.norm(), path


def test_a_tenant_that_diverges_stops_and_changes_no_bit_of_the_others(begin, together):
    job = begin("tenant-diverged", "tenants.two.lr=1e30", "tenants.two.warmup_steps=0")
    rows = job.finish()
    bad = [r for r in rows if r["kind"] == "tenant_bad_step"]
    assert [(r["step"], r["tenant"], r["bad_in_row"], r["stopped"]) for r in bad] == [
        (2, "two", 1, 0), (3, "two", 2, 0), (4, "two", 3, 4)
    ]  # fmt: skip
    assert "that was 3 in a row, so it stops; lower tenants.two.lr" in job.output.read_text()
    for name in ("one", "three"):
        assert_same(alone(factors(job), name), alone(factors(together[0]), name))
        assert figures(rows, name) == figures(together[1], name)


def test_when_every_tenant_has_stopped_the_run_ends_with_a_sentence(begin):
    job = begin(
        "all-diverged",
        "tenants={a: {max_bad_steps: 1}, b: {max_bad_steps: 2}}",
        "train.lr=1e30",
        "train.weight_decay=0.1",
    )
    assert job.wait() == 2
    said = job.output.read_text()
    assert "step 3: every tenant has stopped" in said
    assert "a (at step 2), b (at step 3); lower their lr" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("name", "kill", "extra"),
    [
        ("memory", KillSpec(1, 5, "optimizer"), ()),
        ("dense", KillSpec(0, 6, "optimizer"), ("checkpoint={mode: dense, linger_s: 20}",)),
        ("bad", KillSpec(0, 4, "forward"), ("tenants.two.lr=1e30",)),
        ("bf16", KillSpec(1, 6, "capture"), ("parallel.dtype=bf16",)),
    ],
)
def test_a_killed_run_ends_with_the_bits_of_the_undisturbed_one(begin, together, name, kill, extra):
    # How a run is checkpointed changes none of its bits.
    rows = together[1] if name in ("memory", "dense") else begin(f"calm-{name}", *extra).finish()
    job = begin(f"killed-{name}", *extra, kill=str(kill))
    verdict = judge(job.recipe, kill, rows, job.finish())
    assert verdict.passed, (verdict.problems, job.output.read_text()[-3000:])
    assert verdict.tier == "memory"


def test_a_recovery_is_not_refused_for_memory_that_was_free_at_the_start(begin, together):
    """The limit stands for what is free, of which the keeper has taken some meanwhile."""
    needed = admission(together[0].recipe, None).total / (1 << 30)
    least, less = f"parallel.memory_gib={needed}", f"parallel.memory_gib={needed * 0.999}"
    refused = begin("too-large", less)
    assert refused.wait() == 2
    assert "would fit: take out the others" in refused.output.read_text()
    kill = KillSpec(1, 5, "optimizer")
    assert begin("closely", least, "parallel.restarts=0", kill=str(kill)).wait() != 0
    again = begin("closely", less)
    rows = again.finish()
    verdict = judge(again.recipe, kill, together[1], rows)
    assert verdict.passed, (verdict.problems, again.output.read_text()[-3000:])
    assert verdict.tier in ("memory", "disk")  # the keeper lingers for some seconds, then writes its step
    assert "tenants" in card(again.recipe, num_files=1, num_bytes=1, events=rows)
    with pytest.raises(AdmissionError):
        card(again.recipe, num_files=1, num_bytes=1)


def test_every_tenants_adapter_is_exported_and_loads(together, base, folder):
    out = folder / "tenants-exported"
    assert export.main(str(together[0].run_dir), str(out)) == 0
    assert sorted(path.name for path in (out / "adapters").iterdir()) == ["one", "three", "two"]
    tensors = factors(together[0])
    for name in ("one", "two", "three"):
        adapter = load_adapter(out / "adapters" / name)
        assert_same(adapter.tensors, alone(tensors, name))
        llm = LLM(str(out), expert_budget=1.0, adapter=str(out / "adapters" / name))
        assert len(llm.generate(["def "], 2)) == 1
    model = AutoModelForCausalLM.from_pretrained(out)
    before = model(torch.arange(8)[None]).logits
    apply_adapter(model, load_adapter(out / "adapters" / "one"))
    assert not torch.equal(model(torch.arange(8)[None]).logits, before)
