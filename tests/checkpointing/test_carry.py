"""What a checkpoint of mode pec writes and what it shares."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointing.carry import Older, Part, Selection, split
from checkpointing.records import Entry, Kind
from checkpointing.recovery import RecoveryError
from checkpointing.storage import LocalStorage
from checkpointing.store import Checkpoint, list_checkpoints, retain, verify, write_checkpoint
from checkpointing.tensorfile import Section
from checkpointing.units import Range

METADATA = {"recipe": "r", "lossy": True}


def part(number: int, step: int, fresh: int = 1) -> Part:
    """Four bytes that say the part and the step."""
    unit = "model.a" if number < fresh else f"L00.E{number - fresh:03d}.up"
    entries = (Entry(Range(f"{unit}" if number >= fresh else f"{unit}{number}", "master", 0, 1), "float32", 0, 4),)
    return Part(Kind.BASE, step, (number,), Section(entries, memoryview(bytes([number, step, 0, 0])), None))


def write(directory, step, ages, anew, fresh=1):
    """One coordinate's checkpoint: part -> the step of its newest record in memory."""
    older = Older.find(directory, step, "r")
    files, shared = split(step, "dp0000", [part(n, at, fresh) for n, at in ages.items()], Selection(fresh, anew), older)
    write_checkpoint(directory, step, files, {}, METADATA, carried=shared)
    return files, shared


def held(path):
    """Part -> the step of the copy that counts."""
    checkpoint = Checkpoint.open(path)
    return {int(r.unit[5:8]): checkpoint.read(r).tobytes()[1] for r in checkpoint.entries if r.unit.startswith("L00")}


def test_the_first_checkpoint_holds_every_expert_whatever_is_selected(tmp_path):
    files, shared = write(tmp_path, 4, {0: 4, 1: 3, 2: 4}, [0, 1])
    assert set(files) == {"dp0000", "dp0000.experts-4"}
    assert not shared
    assert held(tmp_path / "step-4") == {0: 3, 1: 4}


def test_an_expert_that_disk_has_of_the_same_step_is_not_written_again(tmp_path):
    write(tmp_path, 4, {0: 4, 1: 3, 2: 4}, None)
    files, shared = write(tmp_path, 8, {0: 8, 1: 3, 2: 7}, [0, 1])
    assert set(files) == {"dp0000"}
    assert set(shared) == {"dp0000.experts-4.safetensors"}
    assert held(tmp_path / "step-8") == {0: 3, 1: 4}


def test_all_are_written_where_no_selection_is_given(tmp_path):
    write(tmp_path, 4, {0: 4, 1: 3, 2: 4}, None)
    _, shared = write(tmp_path, 8, {0: 8, 1: 3, 2: 7}, None)
    assert not shared
    assert held(tmp_path / "step-8") == {0: 3, 1: 7}


def test_nothing_is_shared_with_another_recipe_s_checkpoint(tmp_path):
    write(tmp_path, 4, {0: 4, 1: 3}, None)
    assert Older.find(tmp_path, 8, "another") is None
    assert Older.find(tmp_path, 4, "r") is None


def test_a_record_of_several_parts_is_refused(tmp_path):
    odd = Part(Kind.BASE, 1, (1, 2), Section((), memoryview(b"")))
    with pytest.raises(RecoveryError, match=r"parts \(1, 2\)"):
        split(1, "dp0000", [odd], Selection(1, None), None)


@given(st.lists(st.sets(st.integers(1, 4), max_size=4), min_size=1, max_size=7), st.integers(1, 3), st.data())
def test_each_folder_is_complete_and_holds_the_newest_copies_of_the_course(tmp_path_factory, selections, keep, data):
    directory = tmp_path_factory.mktemp("checkpoints")
    memory, on_disk = dict.fromkeys(range(5), 0), {}
    for step, selected in enumerate(selections, 1):
        captured = data.draw(st.sets(st.integers(1, 4)))
        memory |= {0: step} | dict.fromkeys(captured, step)
        write(directory, step, memory, [0, *selected])
        on_disk = {n: memory[n] if n in selected or n not in on_disk else on_disk[n] for n in range(1, 5)}
        newest = directory / f"step-{step}"
        retain(directory, keep, newest)
        assert verify(newest) == []
        assert held(newest) == {n - 1: at for n, at in on_disk.items()}
    assert len(list_checkpoints(directory)) == min(keep, len(selections))


def test_where_there_are_no_links_files_are_copied(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(1, "Operation not permitted")

    (tmp_path / "a").write_bytes(b"bytes")
    monkeypatch.setattr("checkpointing.storage.os.link", no_links)
    LocalStorage().share(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"bytes"
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError):
        LocalStorage().share(tmp_path / "absent", tmp_path / "c")
