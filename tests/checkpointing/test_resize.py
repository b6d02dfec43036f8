"""State written by one layout and read by another, against values known beforehand."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointing.capture import bytes_of
from checkpointing.materialise import sections_of
from checkpointing.recovery import RecoveryError
from checkpointing.resize import load_resized, tensor_differences
from checkpointing.state.buffers import StateBuffer, StateSpan
from checkpointing.store import Checkpoint, write_checkpoint
from checkpointing.units import Range
from tests.checkpointing.gathered import gathered_hash

SIZES = {"L00.E000.down_proj": 24, "L00.E001.down_proj": 24, "model.norm.weight": 7}
KINDS = ("master", "exp_avg")
TOTAL = sum(SIZES.values())
TRUTH = {kind: torch.randn(TOTAL, generator=torch.Generator().manual_seed(n)) for n, kind in enumerate(KINDS)}
CUTS = st.lists(st.integers(1, TOTAL - 1), max_size=5, unique=True).map(sorted)


def partitions(cuts: list[int], filled: bool) -> list[list[StateBuffer]]:
    """Each rank's part of all units laid end to end, cut anywhere, so that partitions straddle experts."""
    ranks = []
    for lo, hi in zip([0, *cuts], [*cuts, TOTAL], strict=True):
        buffers = []
        for kind in KINDS:
            spans, start = [], 0
            for unit, size in SIZES.items():
                first, last = max(lo, start), min(hi, start + size)
                if first < last:
                    spans.append(StateSpan(Range(unit, kind, first - start, last - start), first - lo))
                start += size
            values = TRUTH[kind][lo:hi].clone() if filled else torch.zeros(hi - lo)
            buffers.append(StateBuffer(f"group0.{kind}", values, tuple(spans)))
        ranks.append(buffers)
    return ranks


def written(folder: Path, cuts: list[int]) -> Checkpoint:
    ranks = partitions(cuts, filled=True)
    sections = {f"dp{rank:04d}": sections_of(buffers, {"rng": b"r"}) for rank, buffers in enumerate(ranks)}
    tensors = {unit: {"elements": size} for unit, size in SIZES.items()}
    return Checkpoint.open(write_checkpoint(folder, 3, sections, tensors, {}))


@settings(max_examples=40, deadline=None)
@given(CUTS, CUTS)
def test_any_layout_loads_into_any_other(before: list[int], after: list[int]) -> None:
    with TemporaryDirectory() as folder:
        checkpoint = written(Path(folder), before)
        ranks = partitions(after, filled=False)
        for buffers in ranks:
            load_resized(buffers, checkpoint)
        assert gathered_hash(checkpoint) == gathered_hash(written(Path(folder) / "again", after))
    for index, kind in enumerate(KINDS):
        assert torch.equal(torch.cat([buffers[index].tensor for buffers in ranks]), TRUTH[kind])


def test_damage_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    checkpoint = written(tmp_path, [30])
    file = checkpoint.file_of("dp0001")
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    (buffers,) = partitions([], filled=False)
    with pytest.raises(RecoveryError, match="dp0001"):
        load_resized(buffers, checkpoint)
    assert not any(bytes_of(buffer.tensor).any() for buffer in buffers)


def test_other_models_are_described() -> None:
    lines = tensor_differences({"a": {"elements": 3}, "b": {}}, {"a": {"elements": 4}, "c": {}})
    assert [line.split(":")[0] for line in lines] == ["b", "c", "a"]


def test_the_gathered_hash_sees_one_changed_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = gathered_hash(written(tmp_path / "a", [30]))
    changed = TRUTH["exp_avg"].clone()
    changed.view(torch.int32)[5] ^= 1
    monkeypatch.setitem(TRUTH, "exp_avg", changed)
    assert gathered_hash(written(tmp_path / "b", [30])) != before
