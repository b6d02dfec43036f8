"""Cases of captured steps that fail, and of what the engine captures; run by test_slot_kernels.py."""

from __future__ import annotations

import dataclasses
import functools
import re
import weakref
from subprocess import TimeoutExpired
from types import SimpleNamespace

import pytest
import torch

from inference import cpu_lane, graphed, native
from inference.compiled_experts import COMPILED
from inference.costmodel import ExpertCosts, Timing
from inference.cpu_lane import LaneHung
from inference.decode import DecodeStep
from inference.engine import LLM
from inference.errors import InferenceError, NotCaptured
from inference.graphs import Uncaptured
from inference.kv import PagedKV
from inference.native import NativeError
from inference.offload import Crossing
from inference.opening import capture_steps
from inference.planner import CallPlanner
from inference.transfer import SimulatedLink
from tests.inference.decode_cases import DEVICE, TABLES, Served
from tests.inference.test_hybrid import EVEN

PROMPTS = [[5, 60, 200, 17], [9, 300]]
AGAIN = "must be started again, since a transfer failed: "
WITH_COMPILED = dataclasses.replace(EVEN, cpu=(*EVEN.cpu, Timing(COMPILED, 2, 1, 25e-6), Timing(COMPILED, 2, 64, 1e-3)))


def opened(folder, budget=0.25, graphs=True, **crossing) -> LLM:
    crossing = Crossing(link=None if DEVICE.type == "cuda" else SimulatedLink(), **crossing)
    llm = LLM(folder, budget, device=DEVICE, crossing=crossing, graphs=graphs, poison=True)
    llm.executor.transfers.source.join()
    return llm


def answers(llm: LLM, prompts=PROMPTS) -> list[tuple[int, ...]]:
    return [generation.token_ids for generation in llm.generate(prompts, max_new_tokens=3)]


def fails_once(monkeypatch, of, name: str, error: BaseException, after: int = 0) -> None:
    """The call behind so many others raises ``error``."""
    call, calls = getattr(of, name), []

    def failing(*args, **more):
        calls.append(name)
        if len(calls) == after + 1:
            raise error
        return call(*args, **more)

    monkeypatch.setattr(of, name, failing)


def test_a_failed_copy_ends_all_steps(model_folder, monkeypatch):
    served = Served(model_folder, 16)
    fails_once(monkeypatch, served.experts.transfer.link, "copy", RuntimeError("CUDA error"), after=2)
    with pytest.raises(InferenceError, match=r"L0\d\.E0\d\d.*: copying .* failed: CUDA error"):
        served.tokens(3)
    assert not (~served.cache._resident_LE & (served.cache.slot_LE >= 0)).any(), "nobody has a slot that was not filled"
    for _ in range(2):
        with pytest.raises(InferenceError, match=AGAIN + "L0"):
            served.step.run([0, 0], TABLES, [5, 17])


def goes_on_behind_an_interrupt(served: Served, model_folder) -> None:
    """A step of ``served`` is interrupted; those behind it are right."""
    with pytest.raises(KeyboardInterrupt):
        served.tokens(3)
    logits, tokens = served.tokens(3)
    want, chosen = Served(model_folder, 16).tokens(3)
    assert torch.allclose(logits, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(tokens, chosen)


@pytest.mark.parametrize(("where", "after"), [("copy", 1), ("copy", 6), ("note", 2)])
def test_a_step_that_was_interrupted_leaves_nothing_behind(model_folder, monkeypatch, where, after):
    """``note`` is called while the device waits for the host to count what the CPU computes."""
    served = Served(model_folder, 16, 0.5)
    of = served.cache if where == "note" else served.experts.transfer.link
    fails_once(monkeypatch, of, where, KeyboardInterrupt(), after)
    goes_on_behind_an_interrupt(served, model_folder)


@pytest.mark.parametrize("where", ["wait", "give_up", "abandon_all"])
def test_tidying_up_that_was_interrupted_is_done_before_the_next_step(model_folder, monkeypatch, where):
    served = Served(model_folder, 16, 0.5)
    experts = served.experts
    of = {"wait": experts.lane, "give_up": experts._ended, "abandon_all": served.cache}[where]
    link = experts.transfer.link
    copy, copied = link.copy, []

    def interrupted(*args):
        copied.append(args)
        if len(copied) == 7:
            fails_once(monkeypatch, of, where, KeyboardInterrupt())  # the next call is that of tidying up
            raise KeyboardInterrupt
        copy(*args)

    monkeypatch.setattr(link, "copy", interrupted)
    goes_on_behind_an_interrupt(served, model_folder)
    assert served.cache.unfinished is None


def test_a_failed_fill_ends_all_calls(model_folder, monkeypatch):
    llm = opened(model_folder, 1.0)
    fails_once(monkeypatch, llm.executor.transfers, "demand", InferenceError("L01.E003: cut short"), after=5)
    with pytest.raises(Exception, match="cut short"):
        answers(llm)
    with pytest.raises(Exception, match=AGAIN + "L01.E003"):
        answers(llm)


def test_a_failed_capture_leaves_others_keys(model_folder):
    class Failing(Uncaptured):
        def capture(self, function):
            function()
            raise MemoryError

    served = Served(model_folder, 64)
    with pytest.raises(MemoryError):
        DecodeStep(served.model, served.step._modules, served.experts, Failing(), 2, len(TABLES[0]))
    kv: PagedKV = served.model.kv
    assert (kv.pool_LNSCD[:, 0, 0] == 7.0).all()


def test_what_a_thread_that_hangs_reads_outlives_the_banks(model_folder, monkeypatch):
    served, lost, given = Served(model_folder, 16, 0.5), [], []
    lane, banks = served.experts.lane, served.experts.transfer.source
    library = lane._library

    def submit(*args):
        given.append(list(served.experts._call.block[: args[1]]))
        return library.lane_submit(*args)

    said = SimpleNamespace(
        lane_count=library.lane_count,
        lane_submit=submit,
        lane_wait=lambda lane: library.lane_wait(lane) or -2 * bool(given),
    )
    with monkeypatch.context() as patch:
        patch.setattr(cpu_lane, "_lost_calls", lost)
        patch.setattr(lane, "_library", said)
        with pytest.raises(LaneHung, match="start again"):
            served.tokens(1)
    banks.close()
    assert banks.ready_share == 0
    ((call, blocks),) = lost
    assert call is served.experts._call
    assert [block.data_ptr() for block in blocks] == given[0]


def test_other_shapes_are_computed_as_they_are(model_folder, monkeypatch):
    monkeypatch.setattr(graphed, "MOST_STEPS", 1)
    llm, plain = opened(model_folder), opened(model_folder, graphs=False)
    for prompts in (PROMPTS, PROMPTS[:1]):
        assert answers(llm, prompts) == answers(plain, prompts)
    assert set(llm.engine.models[None]._steps) == {(2, 16)}


@pytest.mark.parametrize(("budget", "cpu"), [(1.0, False), (0.25, False), (0.25, True)])
def test_a_shape_whose_capture_fails_is_computed_as_it_is(model_folder, monkeypatch, caplog, budget, cpu):
    made = []

    class Failing(Uncaptured):
        def __init__(self, *_):
            super().__init__()
            made.append(weakref.ref(self))

        def capture(self, function):
            super().capture(function)
            function()
            raise torch.OutOfMemoryError("CUDA out of memory")

    for name in ("Uncaptured", "SegmentedGraph"):
        monkeypatch.setattr(graphed, name, Failing)
    more = {"cpu": True, "profile": EVEN} if cpu else {}
    llm, plain = opened(model_folder, budget, **more), opened(model_folder, budget, graphs=False, **more)
    for _ in range(2):
        assert answers(llm) == answers(plain)
    assert [graph() for graph in made] == [None], "one attempt, and nothing of it is left"
    assert caplog.text.count("capturing steps of 2 sequences of 16 blocks failed") == 1
    assert "OutOfMemoryError: CUDA out of memory" in caplog.text
    assert llm.engine.failure is None


def test_both_lanes_are_counted_as_elsewhere(model_folder):
    llm = opened(model_folder, cpu=True, profile=EVEN)
    assert llm._measured().ways == {}, "no call was made"
    answers(llm)
    counts, steps = llm.cache.counts, list(llm.engine.models[None]._steps.values())
    calls = sum(step._experts.counts.calls for step in steps)
    computed = sum(step._experts.counts.computed for step in steps)
    assert counts.computed > computed > 0, "the prompts' and the steps'"
    assert llm._measured().cpu_experts == counts.computed
    brought = counts.misses + sum(step._experts.counts.behind for step in steps)
    assert brought * llm.cache.store.bytes_per_expert == llm.executor.transfers.counts.demanded_bytes
    assert sum(llm._measured().ways.values()) > calls / 2


def test_captured_steps_have_the_threads_of_the_others(model_folder):
    llm = opened(model_folder, cpu=True, profile=WITH_COMPILED)
    assert llm.engine.models[None]._lane is llm.executor.cpu.compiled.lane
    assert opened(model_folder, cpu=True, profile=EVEN).executor.cpu.compiled is None


@pytest.mark.parametrize("error", [PermissionError("~/.cache"), TimeoutExpired("cc", 120), NativeError("no cc")])
def test_a_lane_that_cannot_be_compiled_is_a_sentence(model_folder, monkeypatch, error):
    def refused(*_):
        raise error

    monkeypatch.setattr(native, "_compiled", refused)
    monkeypatch.setattr(native, "opened", functools.cache(native.opened.__wrapped__))
    with pytest.raises(NotCaptured, match=f"no CPU lane: {re.escape(str(error))}, so .*; leave graphs or cpu out"):
        opened(model_folder, cpu=True, profile=EVEN)
    plain = opened(model_folder, graphs=None, cpu=True, profile=EVEN)
    assert not isinstance(plain.engine.models[None], graphed.GraphedModel)


def test_what_graphs_would_not_do_is_refused(model_folder):
    with pytest.raises(InferenceError, match="leave prefetch or graphs out"):
        opened(model_folder, prefetch="next_gate")
    with pytest.raises(InferenceError, match="leave pin=False"):
        opened(model_folder, pin=False)
    with pytest.raises(InferenceError, match=r"6 slots are too few .* give at least 8 \(expert budget 0.125\)"):
        opened(model_folder, 0.1)
    llm = opened(model_folder, graphs=False)
    assert llm.decoding == ""
    with pytest.raises(InferenceError, match="has lookahead heads"):
        capture_steps(llm.model, dataclasses.replace(llm._base, heads=object()), True, watched=False)


def test_steps_are_captured_by_default_where_they_can_be_and_it_is_said(model_folder):
    captured = opened(model_folder, graphs=None)
    assert captured.decoding.startswith("decode steps of few sequences are captured")
    assert isinstance(captured.engine.models[None], graphed.GraphedModel)
    few = opened(model_folder, 0.1, graphs=None)
    assert not isinstance(few.engine.models[None], graphed.GraphedModel)
    if DEVICE.type == "cuda":
        assert few.decoding.startswith("decode steps are not captured: 6 slots are too few to decode in graphs")


@pytest.mark.parametrize("budget", [1.0, 0.25])
def test_captured_steps_have_the_bits_of_the_others(model_folder, budget):
    found = []
    for graphs in (True, False):
        llm, logits = opened(model_folder, budget, graphs), []
        forward = llm.engine.models[None].forward

        def kept(rows, forward=forward, logits=logits):
            logits.append(forward(rows).clone())
            return logits[-1]

        llm.engine.models[None].forward = kept
        answers(llm)
        found.append(logits)
    assert len(found[0]) == len(found[1]) > 2
    for captured, plain in zip(*found, strict=True):
        if DEVICE.type == "cuda":
            assert torch.equal(captured, plain)
        else:  # where experts of steps that are not captured are computed by torch's products
            torch.testing.assert_close(captured, plain, rtol=1e-4, atol=1e-4)


def test_the_link_brings_one_of_what_the_cpu_computes_where_it_is_idle():
    plan = CallPlanner(ExpertCosts.of(dataclasses.replace(EVEN, handover_s=1.0), 64, 32, 4))
    split = graphed.PlannedSplit(plan, 6)
    for misses in range(7):
        fetch, behind = split(misses)
        assert behind == (misses > 0 and fetch == 0)
        assert fetch + behind <= split.most
    fetch, _ = split(6)
    assert 0 < fetch < 6, "no handover is paid for"
    assert sum(plan.modes.values()) == 6 + 1
