"""Parts of one expert each: every named element is in exactly one, and their sizes fit equal slots."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpointing.partial import Experts, most_selected, select
from checkpointing.protection import pec
from checkpointing.records import decode_table
from checkpointing.state.buffers import StateBuffer, StateSpan
from checkpointing.state.expert_parts import expert_parts
from checkpointing.units import Range, expert_of, overlaps, uncovered
from moe.refs import ExpertRef
from tests.checkpointing.placement import imbalance, zero_placement


@st.composite
def states(draw: st.DrawFn) -> list[StateBuffer]:
    """Partitions in which tensors of experts and others lie in any order, with padding behind."""
    units = draw(
        st.lists(
            st.tuples(st.sampled_from(["model.a", "L00.E000.up", "L00.E001.up", "L02.E001.down"]), st.integers(1, 700)),
            min_size=1,
            max_size=8,
        )
    )
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    buffers = []
    for kind in ("master", "exp_avg"):
        at, taken, spans = draw(st.integers(0, 70)), {}, []
        for unit, size in units:
            lo = taken.get(unit, 0)
            spans.append(StateSpan(Range(unit, kind, lo, lo + size), at))
            taken[unit], at = lo + size, at + size
        buffers.append(StateBuffer(f"group0.{kind}", torch.zeros(at + 5, dtype=dtype), tuple(spans)))
    return buffers


@given(states())
def test_every_element_is_in_one_part_and_an_expert_in_its_own(buffers: list[StateBuffer]) -> None:
    parts = expert_parts(buffers)
    wanted = [span.range for buffer in buffers for span in buffer.spans]
    held = [entry.range for fragment in parts.fragments for entry in fragment.entries]
    assert not uncovered(wanted, held)
    assert not uncovered(held, wanted)
    assert not overlaps(held)
    for number, fragment in enumerate(parts.fragments):
        refs = {expert_of(entry.range.unit) for entry in fragment.entries}
        assert refs <= ({None} if number < parts.fresh else {parts.experts[number - parts.fresh]})
        assert decode_table(fragment.table).parts == (number,)


@given(states())
def test_chunks_of_the_rest_are_about_as_large_as_the_largest_expert(buffers: list[StateBuffer]) -> None:
    parts = expert_parts(buffers)
    largest = max((f.nbytes for f in parts.fragments[parts.fresh :]), default=0)
    rest = [f.nbytes for f in parts.fragments[: parts.fresh]]
    if largest:
        # Alignment of chunks and of pieces in them.
        assert max(rest) <= largest + 64 * 8 + 256 * len(buffers)
    else:
        assert parts.fresh == 1


def test_parts_of_experts_that_are_elsewhere_are_left_out() -> None:
    spans = (StateSpan(Range("L00.E001.up", "master", 0, 9), 0), StateSpan(Range("model.a", "master", 0, 9), 9))
    parts = expert_parts([StateBuffer("group0.master", torch.zeros(18), spans)])
    assert parts.experts == (ExpertRef(0, 1),)
    assert parts.numbers([ExpertRef(0, 0)]) == [0]
    assert parts.numbers([ExpertRef(0, 1), ExpertRef(0, 0)]) == [0, 1]


def state_of(rank: int, experts: Experts, sizes: dict[str, int], others: int) -> list[StateBuffer]:
    """What ZeRO puts on a rank: its share of the rest, and of the experts as in :func:`zero_placement`."""
    buffers = []
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        rest = (StateSpan(Range("model.a", kind, others * rank, others * (rank + 1)), 0),)
        buffers.append(StateBuffer(f"group0.{kind}", torch.zeros(others), rest))
        at, spans = 0, []
        for piece in zero_placement(experts, sizes, kind)[rank]:
            spans.append(StateSpan(piece, at))
            at += piece.size
        buffers.append(StateBuffer(f"group1.{kind}", torch.zeros(at), tuple(spans)))
    return buffers


@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_captures_are_balanced_over_the_ranks(ep: int, k: int) -> None:
    """Payload bytes of the real fragments: max over mean at most 1.05 where K x layers divides by the EP degree."""
    experts = Experts((0, 1, 2, 3), 8, ep=ep)
    parts = [
        expert_parts(state_of(rank, experts, {"gate_up_proj": 4096, "down_proj": 2048}, 20_000)) for rank in range(ep)
    ]
    for checkpoint in range(16):
        chosen = select(experts, checkpoint, k)
        assert imbalance(p.nbytes(chosen) for p in parts) <= 1.05
        assert imbalance(p.nbytes(chosen) - p.nbytes([]) for p in parts) <= 1.05


@given(st.integers(1, 4), st.integers(1, 8), st.integers(0, 40))
def test_no_selection_is_larger_than_the_memory_allows_for(layers: int, k: int, checkpoint: int) -> None:
    experts = Experts(tuple(range(layers)), 8, ep=2)
    here = [ref for ref in experts.all() if ref.expert < 4]
    assert len(set(here) & set(select(experts, checkpoint, k))) <= most_selected(experts, here, k)


def test_memory_is_the_state_once_and_room_for_captures_under_way() -> None:
    experts = Experts((0, 1), 4)
    buffers = state_of(0, experts, {"up": 1024}, 4096)
    parts = expert_parts(buffers)
    shape = pec(buffers, experts, 1, sequential=True, disk=False).shape
    assert shape.base.count == len(parts.fragments) + 3 * (parts.fresh + 2)
    assert pec(buffers, experts, 1, True, disk=True).shape.base.count == shape.base.count + len(parts.fragments)
    assert shape.log.count == 0
