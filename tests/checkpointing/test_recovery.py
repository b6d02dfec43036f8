"""What can be recovered, which step is chosen, and the bytes that move."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpointing.records import Entry, Kind, RecordInfo
from checkpointing.recovery import Need, RecoveryError, available_steps, plan_recovery, transfers
from checkpointing.state.buffers import StateBuffer, StateSpan, needs_of
from checkpointing.state.fragments import rotation
from checkpointing.units import Range

UNIT = "L03.E017.down_proj"


def need(lo: int, hi: int) -> Need:
    return Need(Range(UNIT, "exp_avg", lo, hi), "float32", "b", 0)


def base(source: str, step: int, *intervals: tuple[int, int], slot: int = 0) -> RecordInfo:
    entries, at = [], 0
    for lo, hi in intervals:
        entries.append(Entry(Range(UNIT, "exp_avg", lo, hi), "float32", at, 4 * (hi - lo)))
        at += 4 * (hi - lo)
    return RecordInfo(source, Kind.BASE, step, 0, 0, tuple(entries), slot)


def extras(source: str, step: int) -> RecordInfo:
    return RecordInfo(source, Kind.EXTRAS, step, 0, 0, ())


def test_a_step_needs_every_element_once_and_the_extras():
    records = [
        base("dp0", 5, (0, 8)), extras("dp0", 5),
        base("dp0", 6, (0, 7)), extras("dp0", 6),
        base("dp0", 7, (0, 8)), extras("dp1", 7),
        base("dp0", 8, (0, 8)), base("dp1", 8, (7, 9)), extras("dp0", 8),
        base("dp0", 9, (0, 3)), base("dp1", 9, (3, 8)), extras("dp0", 9),
    ]  # fmt: skip
    assert available_steps([need(0, 8)], records, "dp0") == [5, 9]


@pytest.mark.parametrize(
    ("reports", "step", "tier", "tiers"),
    [
        ([{"memory": [7, 8], "disk": [5]}] * 2, 8, "memory", ("memory", "memory")),
        ([{"memory": [7, 8]}, {"memory": [7]}], 7, "memory", ("memory", "memory")),
        ([{"memory": [8], "disk": [8]}] * 2, 8, "memory", ("memory", "memory")),
        ([{"memory": [3], "disk": [5]}] * 2, 5, "disk", ("disk", "disk")),
        ([{"memory": [8], "disk": [8]}, {"memory": [], "disk": [8]}], 8, "disk", ("disk", "disk")),
        ([{"memory": [8], "disk": []}, {"memory": [], "disk": [8]}], 8, "disk", ("memory", "disk")),
        ([{"memory": [8]}, {"memory": [7]}], -1, "fresh", ("fresh", "fresh")),
        ([{"memory": [], "disk": []}], -1, "fresh", ("fresh",)),
    ],
)
def test_the_newest_step_complete_on_all_ranks_is_chosen(reports, step, tier, tiers):
    plan = plan_recovery(reports)
    assert (plan.step, plan.tier, plan.tiers) == (step, tier, tiers)
    assert tier == "fresh" or f"step {step} is the newest" in plan.reason


def test_the_reason_says_what_each_tier_had():
    plan = plan_recovery([{"memory": [7, 8], "disk": [6]}, {"memory": [7], "disk": [6]}])
    assert "memory had steps 7, 8 on rank 0, step 7 on rank 1" in plan.reason
    assert "disk had step 6 on all ranks" in plan.reason
    assert plan.alternatives == ((6, "disk"),)


cuts = st.lists(st.integers(1, 63), max_size=6, unique=True).map(lambda some: [0, *sorted(some), 64])


@given(cuts, cuts)
def test_any_partition_can_be_read_into_any_other(written, wanted):
    whole = torch.arange(64, dtype=torch.float32)
    sources, records = {}, []
    for i, (lo, hi) in enumerate(itertools.pairwise(written)):
        records.append(base(f"dp{i}", 4, (lo, hi), slot=i))
        sources[f"dp{i}", i] = whole[lo:hi].clone().view(torch.uint8)
    buffers = [
        StateBuffer(f"b{lo}", torch.full((hi - lo + 3,), -1.0), (StateSpan(Range(UNIT, "exp_avg", lo, hi), 2),))
        for lo, hi in itertools.pairwise(wanted)
    ]
    targets = {b.name: b.tensor.view(torch.uint8) for b in buffers}
    for move in transfers(needs_of(buffers), records):
        part = sources[move.source, move.slot][move.source_offset : move.source_offset + move.nbytes]
        targets[move.buffer][move.buffer_offset : move.buffer_offset + move.nbytes] = part
    assert torch.equal(torch.cat([b.tensor[2:-1] for b in buffers]), whole)
    assert all(b.tensor[[0, 1, -1]].tolist() == [-1, -1, -1] for b in buffers)


def test_neighbours_move_in_one_copy():
    records = [base("dp0", 4, (0, 3), (3, 5), (5, 8))]
    needs = [Need(Range(UNIT, "exp_avg", lo, hi), "float32", "b", 4 * lo) for lo, hi in [(0, 3), (3, 5), (5, 8)]]
    assert [m.nbytes for m in transfers(needs, records)] == [32]


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([base("dp0", 4, (0, 5))], r"L03\.E017\.down_proj#exp_avg\[5:8\) is absent"),
        ([base("dp0", 4, (2, 8))], r"L03\.E017\.down_proj#exp_avg\[0:2\) is absent"),
        ([base("dp0", 4, (0, 5)), base("dp1", 4, (4, 8))], r"\[4:5\) is held twice"),
        ([], r"\[0:8\) is absent"),
    ],
)
def test_what_cannot_be_filled_is_named(records, words):
    with pytest.raises(RecoveryError, match=words):
        transfers([need(0, 8)], records)


def test_another_dtype_is_refused():
    wanted = Need(Range(UNIT, "exp_avg", 0, 8), "bfloat16", "b", 0)
    with pytest.raises(RecoveryError, match="float32, this run needs bfloat16"):
        transfers([wanted], [base("dp0", 4, (0, 8))])


def test_buffers_are_checked():
    span = StateSpan(Range(UNIT, "master", 0, 8), 0)
    with pytest.raises(ValueError, match="flat"):
        StateBuffer("b", torch.zeros(4, 4), ())
    with pytest.raises(ValueError, match="leaves it"):
        StateBuffer("b", torch.zeros(7), (span,))
    with pytest.raises(ValueError, match="overlaps"):
        StateBuffer("b", torch.zeros(12), (span, StateSpan(Range(UNIT, "master", 8, 12), 7)))
    with pytest.raises(ValueError, match="complex64"):
        StateBuffer("b", torch.zeros(8, dtype=torch.complex64), (span,))
    with pytest.raises(ValueError, match="share a name"):
        rotation([StateBuffer("b", torch.zeros(8), (span,))] * 2, 1)
