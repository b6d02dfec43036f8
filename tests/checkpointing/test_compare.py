"""Two states compared by interval arithmetic: whatever cut them up, only their elements count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointing.audit import audit
from checkpointing.compare import compare, overlay
from checkpointing.records import Entry, extras_entries
from checkpointing.recovery import RecoveryError
from checkpointing.store import Checkpoint, write_checkpoint
from checkpointing.tensorfile import Section
from checkpointing.units import Range

UNIT = "L00.E003.down_proj"
State = Mapping[tuple[str, str], torch.Tensor]


def part_of(unit: str, kind: str, lo: int, values: torch.Tensor) -> Section:
    dtype = str(values.dtype).removeprefix("torch.")
    data = values.contiguous().view(torch.uint8).numpy()
    entry = Entry(Range(unit, kind, lo, lo + values.numel()), dtype, 0, values.nbytes)
    return Section([entry], memoryview(data).cast("B") if values.numel() else memoryview(b""))


def checkpoint_of(
    folder: Path, state: State, cuts: Sequence[int], workers: int = 1, extras: bytes = b"x"
) -> Checkpoint:
    """A checkpoint in which every tensor is cut at ``cuts``, the pieces dealt out to the workers."""
    parts: dict[str, list[Section]] = {f"dp{rank:04d}": [] for rank in range(workers)}
    tensors = {}
    for (unit, kind), whole in state.items():
        tensors[unit] = {"elements": whole.numel()}
        bounds = [0, *sorted({c for c in cuts if 0 < c < whole.numel()}), whole.numel()]
        for index, (lo, hi) in enumerate(pairwise(bounds)):
            parts[f"dp{index % workers:04d}"].append(part_of(unit, kind, lo, whole[lo:hi]))
    for held in parts.values():
        held.append(Section(extras_entries({"rng": extras}), memoryview(extras)))
    return Checkpoint.open(write_checkpoint(folder, 4, parts, tensors, {}))


def test_a_state_is_equal_to_itself_in_other_pieces(tmp_path: Path) -> None:
    state = {(UNIT, "master"): torch.randn(500), (UNIT, "exp_avg"): torch.randn(500), ("norm", "master"): torch.ones(3)}
    ours = checkpoint_of(tmp_path / "a", state, [100, 333])
    theirs = checkpoint_of(tmp_path / "b", state, [7, 100, 101, 490], workers=2)
    found = list(compare(ours, theirs))
    assert [f.name for f in found] == [f"{UNIT}#exp_avg", f"{UNIT}#master", "norm#master"], "no extras: other workers"
    assert all(f.equal for f in found)
    assert [f.elements for f in found] == [500, 500, 3]


def test_differences_are_counted_and_measured(tmp_path: Path) -> None:
    before = {(UNIT, "master"): torch.arange(100.0), ("bf", "master"): torch.arange(8).bfloat16()}
    after = {key: value.clone() for key, value in before.items()}
    after[UNIT, "master"][[3, 60]] += torch.tensor([0.5, -2.0])
    after["bf", "master"][2] = -2
    ours = checkpoint_of(tmp_path / "a", before, [50], extras=b"old")
    theirs = checkpoint_of(tmp_path / "b", after, [61], extras=b"new")
    found = {f.name: f for f in compare(ours, theirs)}
    assert (found[f"{UNIT}#master"].different, found[f"{UNIT}#master"].largest) == (2, 2.0)
    assert (found["bf#master"].different, found["bf#master"].largest) == (1, 4.0)
    assert found["dp0000/rng"].notes == ("other bytes",)


@pytest.mark.parametrize(
    ("a", "b", "different", "largest"),
    [
        (float("nan"), float("nan"), 0, 0.0),
        (float("inf"), float("inf"), 0, 0.0),
        (float("nan"), 1.0, 1, float("inf")),
        (float("inf"), float("-inf"), 1, float("inf")),
        (0.0, -0.0, 1, 0.0),
    ],
)
def test_what_is_no_number_is_compared_by_its_bits(
    tmp_path: Path, a: float, b: float, different: int, largest: float
) -> None:
    left = checkpoint_of(tmp_path / "a", {(UNIT, "master"): torch.tensor([1.0, a])}, [])
    right = checkpoint_of(tmp_path / "b", {(UNIT, "master"): torch.tensor([1.0, b])}, [])
    found = next(compare(left, right))
    assert (found.different, found.largest) == (different, largest)


def test_what_is_absent_or_of_another_dtype_is_said(tmp_path: Path) -> None:
    ours = checkpoint_of(tmp_path / "a", {(UNIT, "master"): torch.arange(10.0), ("x", "master"): torch.ones(4)}, [])
    parts = {"dp0000": [part_of("x", "master", 0, torch.ones(4).bfloat16()), part_of("y", "master", 2, torch.ones(2))]}
    theirs = Checkpoint.open(write_checkpoint(tmp_path / "b", 4, parts, {}, {}))
    found = {f.name: f for f in compare(ours, theirs)}
    assert found[f"{UNIT}#master"].notes == (f"absent from {theirs.path}",)
    assert found["y#master"].notes == (f"absent from {ours.path}",)
    assert (found["x#master"].notes, found["x#master"].different) == (("float32 and bfloat16",), 0)
    assert not any(f.equal for name, f in found.items() if "#" in name)
    short = checkpoint_of(tmp_path / "c", {(UNIT, "master"): torch.arange(6.0)}, [])
    assert next(compare(ours, short)).notes == (f"[6:10) absent from {short.path}",)


def test_what_is_held_twice_is_refused(tmp_path: Path) -> None:
    parts = {"dp0000": [part_of("x", "master", 0, torch.ones(4)), part_of("x", "master", 3, torch.ones(4))]}
    twice = Checkpoint.open(write_checkpoint(tmp_path, 4, parts, {}, {}))
    with pytest.raises(RecoveryError, match=r"x#master\[3:4\) twice"):
        list(compare(twice, twice))
    assert audit(twice.path) == [f"{twice.path}: holds x#master[3:4) twice"]


def test_an_audit_names_the_state_that_went_with_a_file(tmp_path: Path) -> None:
    state = {(f"L00.E{e:03d}.down_proj", "master"): torch.ones(10) for e in range(5)}
    checkpoint = checkpoint_of(tmp_path, state, [6], workers=2)
    assert audit(checkpoint.path) == []
    checkpoint.file_of("dp0001").unlink()
    gone, lacks = audit(checkpoint.path)
    assert gone == f"{checkpoint.file_of('dp0001')}: No such file or directory"
    assert lacks.startswith(
        f"{checkpoint.path}: lacks L00.E000.down_proj#master[6:10), L00.E001.down_proj#master[6:10)"
    )
    assert lacks.endswith("and 2 more")


_CUTS = st.lists(st.integers(0, 40), max_size=6)


@given(ours=_CUTS, theirs=_CUTS, holes=st.sets(st.integers(0, 5)))
def test_an_overlay_holds_every_element_once_with_its_holders(
    ours: list[int], theirs: list[int], holes: set[int]
) -> None:
    def ranges(cuts: list[int]) -> list[Range]:
        bounds = sorted({0, *cuts, 40})
        return [Range("u", "k", lo, hi) for i, (lo, hi) in enumerate(pairwise(bounds)) if i not in holes]

    left, right = ranges(ours), ranges(theirs)
    pieces = overlay(left[::-1], right)
    assert [p.lo for p in pieces] == sorted(p.lo for p in pieces)
    for element in range(40):
        holders = [next((r for r in side if r.lo <= element < r.hi), None) for side in (left, right)]
        found = [(p.ours, p.theirs) for p in pieces if p.lo <= element < p.hi]
        assert found == ([tuple(holders)] if any(holders) else [])


@given(cuts=_CUTS, others=_CUTS, changed=st.sets(st.integers(0, 39)), workers=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_any_two_layouts_of_two_states_differ_where_the_states_do(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], others: list[int], changed: set[int], workers: int
) -> None:
    folder = tmp_path_factory.mktemp("diff")
    values = torch.arange(40.0)
    after = values.clone()
    for index in changed:
        after[index] += 1 + index
    ours = checkpoint_of(folder / "a", {(UNIT, "master"): values}, cuts)
    theirs = checkpoint_of(folder / "b", {(UNIT, "master"): after}, others, workers)
    found = next(compare(ours, theirs))
    assert (found.different, found.largest) == (len(changed), max((1.0 + i for i in changed), default=0.0))
    assert np.array_equal(theirs.assemble(UNIT, "master"), after.numpy())
