"""The disk tier: a checkpoint exists if and only if its manifest verifies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from checkpointing import store
from checkpointing.records import Entry, extras_entries
from checkpointing.recovery import RecoveryError
from checkpointing.store import Checkpoint, best_intact, list_checkpoints, quarantine, retain, verify, write_checkpoint
from checkpointing.tensorfile import Section
from checkpointing.units import Range

UNIT = "L00.E003.down_proj"
EXTRAS = {"rng": b"abc", "cursor": b""}


def parts_of(rank: int, step: int) -> list[Section]:
    """Half of an fp32 unit with padding around it, a bf16 unit before it in memory, and extras."""
    master = torch.arange(600, dtype=torch.float32) + 1000 * rank + step
    small = torch.arange(33).bfloat16()
    payload = torch.zeros(4096, dtype=torch.uint8)
    payload[100:166] = small.view(torch.uint8)
    payload[512 : 512 + 2400] = master.view(torch.uint8)
    entries = [
        Entry(Range(f"norm{rank}", "master", 0, 33), "bfloat16", 100, 66),
        Entry(Range(UNIT, "master", 600 * rank, 600 * rank + 250), "float32", 512, 1000),
        Entry(Range(UNIT, "master", 600 * rank + 250, 600 * rank + 600), "float32", 1512, 1400),
    ]
    return [
        Section(entries, memoryview(payload.numpy()).cast("B")),
        Section(extras_entries(EXTRAS), memoryview(b"".join(EXTRAS.values()))),
    ]


def write(folder: Path, step: int, progress=lambda w, t: None, tensors=None) -> Path:
    parts = {f"dp{rank:04d}": parts_of(rank, step) for rank in range(2)}
    return write_checkpoint(folder, step, parts, tensors or {}, {"torch": "x"}, progress)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def whole(step: int) -> np.ndarray:
    return np.concatenate([np.arange(600, dtype=np.float32) + 1000 * rank + step for rank in range(2)])


def test_what_was_written_reads_back(tmp_path):
    path = write(tmp_path, 4)
    assert verify(path) == []
    checkpoint = Checkpoint.open(path)
    assert checkpoint.step == 4
    assert checkpoint.manifest["metadata"] == {"torch": "x"}
    assert len(checkpoint.entries) == 6
    assert np.array_equal(checkpoint.read(Range(UNIT, "master", 250, 600)), whole(4)[250:600])
    assert np.array_equal(checkpoint.assemble(UNIT, "master"), whole(4))
    bits = checkpoint.assemble("norm1", "master")
    assert torch.equal(torch.from_numpy(bits).view(torch.bfloat16), torch.arange(33).bfloat16())
    assert checkpoint.extras("dp0001") == EXTRAS
    assert (tmp_path / "latest").read_text() == "step-4\n"


def test_the_files_are_safetensors_without_padding(tmp_path):
    path = write(tmp_path, 4) / "dp0000.safetensors"
    with safe_open(str(path), "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert {key: t.dtype for key, t in tensors.items()} == {
        f"{UNIT}#master[0:250)": torch.float32,
        f"{UNIT}#master[250:600)": torch.float32,
        "norm0#master[0:33)": torch.bfloat16,
        "extras/rng": torch.uint8,
        "extras/cursor": torch.uint8,
    }
    assert tensors["norm0#master[0:33)"].tolist() == list(range(33))
    assert sum(t.nbytes for t in tensors.values()) == 2400 + 66 + 3


def test_the_manifest_comes_last(tmp_path):
    seen = []

    def progress(written: int, total: int) -> None:
        seen.append((written, total))
        assert list_checkpoints(tmp_path) == []
        assert not list(tmp_path.rglob("manifest.json"))

    write(tmp_path, 4, progress)
    assert seen[-1][0] == seen[-1][1]
    assert any(2 * w >= t and w < t for w, t in seen), "a drill must be able to hit the middle"
    assert [step for step, _ in list_checkpoints(tmp_path)] == [4]


def test_an_error_half_way_leaves_nothing_and_the_old_one_valid(tmp_path):
    write(tmp_path, 4)

    def full(written: int, total: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write(tmp_path, 6, full)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-4"]
    assert verify(tmp_path / "step-4") == []


def test_every_flipped_bit_of_every_file_is_detected(tmp_path):
    path = write(tmp_path, 4)
    rng = np.random.default_rng(0)
    for file in sorted(path.iterdir()):
        original = file.read_bytes()
        for at in [0, len(original) - 1, *rng.integers(0, len(original), 60).tolist()]:
            damaged = bytearray(original)
            damaged[at] ^= 1 << int(rng.integers(8))
            file.write_bytes(damaged)
            if file.name == "manifest.json" and _same_json(damaged, original):
                continue
            problems = verify(path)
            assert problems, f"{file.name}, byte {at}"
            assert file.name in problems[0] or "manifest" in problems[0]
        file.write_bytes(original)
    assert verify(path) == []


def _same_json(a: bytes, b: bytes) -> bool:
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


def test_unfinished_truncated_and_incomplete_folders_are_not_checkpoints(tmp_path):
    for step in (2, 4, 6, 8):
        write(tmp_path, step)
    (tmp_path / "step-4").rename(tmp_path / "step-4.tmp")
    (tmp_path / "step-6" / "dp0001.safetensors").unlink()
    file = tmp_path / "step-8" / "dp0000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    shutil.copytree(tmp_path / "step-2", tmp_path / "step-10")
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2]
    assert "dp0001.safetensors" in verify(tmp_path / "step-6")[0]
    assert "dp0000.safetensors" in verify(tmp_path / "step-8")[0]
    assert "step 2" in verify(tmp_path / "step-10")[0]
    with pytest.raises(RecoveryError, match="step-6"):
        Checkpoint.open(tmp_path / "step-6")


def test_a_damaged_checkpoint_is_set_aside_and_never_deleted(tmp_path):
    for _ in range(2):
        path = write(tmp_path, 4)
        quarantine(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-4.corrupt", "step-4.corrupt2"]
    (write(tmp_path, 6) / "dp0000.safetensors").write_bytes(b"")
    write(tmp_path, 6)
    assert verify(tmp_path / "step-6") == []
    assert (tmp_path / "step-6.corrupt").exists()


def test_old_ones_go_only_after_the_new_one_was_read_back(tmp_path):
    for step in (2, 4, 6, 8):
        newest = write(tmp_path, step)
    file = newest / "dp0000.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(RecoveryError, match="nothing was deleted"):
        retain(tmp_path, 2, newest)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 4, 6, 8]
    file.write_bytes(good)
    assert retain(tmp_path, 2, newest) == [2, 4]
    assert [step for step, _ in list_checkpoints(tmp_path)] == [6, 8]


def test_the_one_with_the_lowest_heldout_loss_stays(tmp_path):
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: 2.5}
    for step in (2, 4, 6):
        newest = write(tmp_path, step)
    assert retain(tmp_path, 1, newest, losses=losses) == [2]
    assert retain(tmp_path, 1, write(tmp_path, 8), losses=losses) == [6]
    assert [step for step, _ in list_checkpoints(tmp_path)] == [4, 8]
    # Of those that are there: a step without a checkpoint is no reason to remove the best that has one.
    newest = write(tmp_path, 10)
    assert retain(tmp_path, 1, newest, losses={**losses, 9: 0.1}) == [8]
    assert retain(tmp_path, 1, newest, losses={**losses, 10: 0.5}) == [4]


def test_a_damaged_best_takes_no_other_ones_place(tmp_path):
    losses = {2: 1.0, 4: 2.0, 6: 3.0}
    for step in (2, 4, 6, 8):
        newest = write(tmp_path, step)
    flip(tmp_path / "step-2" / "dp0000.safetensors")
    assert best_intact(tmp_path, losses) == 4
    assert retain(tmp_path, 1, newest, losses=losses) == [2, 6], "the best that can be used stays"
    flip(tmp_path / "step-4" / "dp0000.safetensors")
    newest = write(tmp_path, 10)
    assert retain(tmp_path, 1, newest, losses=losses) == [8], "it may lie while nothing evaluated would go"
    assert best_intact(tmp_path, losses) is None


def test_a_unit_that_is_not_whole_is_named(tmp_path):
    first, second = parts_of(0, 4), parts_of(1, 4)
    folder = write_checkpoint(tmp_path / "a", 4, {"dp0001": second}, {}, {})
    with pytest.raises(RecoveryError, match=r"lacks L00\.E003\.down_proj#master\[0:600\)"):
        Checkpoint.open(folder).assemble(UNIT, "master")
    folder = write_checkpoint(tmp_path / "b", 4, {"dp0000": first}, {UNIT: {"elements": 1200}}, {})
    with pytest.raises(RecoveryError, match=r"lacks L00\.E003\.down_proj#master\[600:1200\)"):
        Checkpoint.open(folder).assemble(UNIT, "master")
    more = Section([Entry(Range(UNIT, "master", 599, 700), "float32", 512, 404)], second[0].payload)
    folder = write_checkpoint(tmp_path / "c", 4, {"dp0000": first, "dp0001": [more]}, {}, {})
    with pytest.raises(RecoveryError, match=r"master\[599:600\) twice"):
        Checkpoint.open(folder).assemble(UNIT, "master")
    with pytest.raises(RecoveryError, match="nothing of"):
        Checkpoint.open(folder).assemble(UNIT, "exp_avg")


def test_unfinished_folders_are_cleaned(tmp_path):
    (tmp_path / "step-9.tmp").mkdir()
    write(tmp_path, 4)
    store.clean_unfinished(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-4"]
