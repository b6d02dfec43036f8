"""The same store on a local folder, behind fsspec URLs, and on an object store: nothing but the place differs."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import fsspec
import numpy as np
import pytest

from checkpointing.records import Entry, extras_entries
from checkpointing.recovery import RecoveryError
from checkpointing.remote import LocationError, RemotePath, UnreachableError
from checkpointing.storage import LocalStorage, Place, place_of
from checkpointing.store import (
    Checkpoint,
    abandon_newer,
    clean_unfinished,
    list_checkpoints,
    quarantine,
    retain,
    set_aside,
    verify,
    write_checkpoint,
)
from checkpointing.tensorfile import Section
from checkpointing.units import Range

UNITS = ("L00.E000.down_proj", "L00.E001.down_proj")
# A real S3 protocol is spoken where s3fs and moto, a server of it, are installed.
BACKENDS = ["local", "file", "memory", "dir", *(["s3"] if find_spec("s3fs") and find_spec("moto") else [])]


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=BACKENDS)
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A folder that does not exist yet."""
    if request.param == "s3":
        for name, value in (
            ("AWS_ENDPOINT_URL", request.getfixturevalue("s3")),
            ("AWS_ACCESS_KEY_ID", "x"),
            ("AWS_SECRET_ACCESS_KEY", "x"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            monkeypatch.setenv(name, value)
        fsspec.filesystem("s3").mkdir(tmp_path.name.replace("_", "-").lower()[-50:])
    return place_of(
        {
            "local": str(tmp_path / "c"),
            "file": f"file://{tmp_path / 'c'}",
            "memory": f"memory://{tmp_path.name}/c",
            "dir": f"dir::file://{tmp_path / 'c'}",
            "s3": f"s3://{tmp_path.name.replace('_', '-').lower()[-50:]}/c",
        }[request.param]
    )


@pytest.fixture
def remote(tmp_path: Path) -> RemotePath:
    found = place_of(f"memory://{tmp_path.name}/c")
    assert isinstance(found, RemotePath)
    return found


def write(
    place: Place, step: int, progress: Callable[[int, int], None] = lambda w, t: None, permanent: bool = False
) -> Place:
    parts = {}
    for rank, unit in enumerate(UNITS):
        values = np.arange(500, dtype=np.float32) + 1000 * rank + step
        entries = [
            Entry(Range(unit, kind, 0, 250), "float32", at, 1000) for kind, at in (("master", 0), ("exp_avg", 1000))
        ]
        extras = {"rng": b"rank %d" % rank, "empty": b""}
        parts[f"dp{rank:04d}"] = [
            Section(entries, memoryview(values).cast("B")),
            Section(extras_entries(extras), memoryview(b"".join(extras.values()))),
        ]
    metadata = {"recipe": "r"} | ({"permanent": True} if permanent else {})
    return write_checkpoint(place, step, parts, {unit: {"elements": 250} for unit in UNITS}, metadata, progress)


def steps(place: Place) -> list[int]:
    return [step for step, _ in list_checkpoints(place)]


def damage(path: Place, change: Callable[[bytearray], object]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(bytes(data))


def test_what_was_written_reads_back(place: Place) -> None:
    assert steps(place) == []
    path = write(place, 4)
    assert verify(path) == []
    checkpoint = Checkpoint.open(path)
    assert checkpoint.is_whole
    held = checkpoint.entries[-1]
    assert (held, checkpoint.dtype_of(held)) == (Range(UNITS[1], "master", 0, 250), "float32")
    assert np.array_equal(checkpoint.read(held), np.arange(250, dtype=np.float32) + 1004)
    assert np.array_equal(checkpoint.read_part(held, 7, 9), np.array([1011, 1012], dtype=np.float32))
    assert checkpoint.extras("dp0001") == {"rng": b"rank 1", "empty": b""}
    assert (place / "latest").read_bytes() == b"step-4\n"
    assert {p.name for p in path.iterdir()} == {"dp0000.safetensors", "dp0001.safetensors", "manifest.json"}


def test_the_manifest_comes_last(place: Place) -> None:
    seen: list[list[int]] = []
    write(place, 4, lambda written, total: seen.append(steps(place)))
    assert seen
    assert not any(seen)
    assert steps(place) == [4]


def test_an_error_half_way_leaves_nothing_and_the_old_one_valid(place: Place) -> None:
    write(place, 4)

    def fail(written: int, total: int) -> None:
        if 2 * written >= total:
            raise OSError(errno.EIO, "dead")

    with pytest.raises(OSError, match="dead"):
        write(place, 6, fail)
    assert {p.name for p in place.iterdir()} == {"step-4", "latest"}
    assert verify(place / "step-4") == []


def test_a_stale_unknown_or_absent_hint_never_matters(place: Place) -> None:
    write(place, 4)
    for text in (b"step-99\n", b"", b"\xff/../.."):
        (place / "latest").write_bytes(text)
        assert steps(place) == [4]
    (place / "latest").unlink()
    assert steps(place) == [4]


def test_without_its_manifest_it_does_not_exist(place: Place) -> None:
    path = write(place, 4)
    (path / "manifest.json").unlink()
    assert steps(place) == []
    assert "manifest.json" in verify(path)[0]


def test_damage_names_the_file_and_the_tensor(place: Place) -> None:
    path = write(place, 4)
    file = path / "dp0001.safetensors"
    good = file.read_bytes()
    damage(file, lambda data: data.__setitem__(-1500, data[-1500] ^ 1))
    (problem,) = verify(path)
    assert problem.startswith(f"{file}: its bytes do not match")
    assert f"damaged: {UNITS[1]}#master[0:250)" in problem
    file.write_bytes(good)
    damage(file, lambda data: data.__setitem__(0, data[0] ^ 1))
    assert "damaged: the header" in verify(path)[0]
    file.write_bytes(good[:-1])
    assert verify(path) == [f"{file}: {len(good) - 1:,} bytes, the manifest says {len(good):,}"]
    file.unlink()
    assert str(file) in verify(path)[0]
    assert steps(place) == []


def test_exchanged_files_are_named(place: Place) -> None:
    path = write(place, 4)
    one, other = path / "dp0000.safetensors", path / "dp0001.safetensors"
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    assert verify(path) == [
        f"{one}: holds the bytes of dp0001.safetensors: files were exchanged",
        f"{other}: holds the bytes of dp0000.safetensors: files were exchanged",
    ]
    assert verify(path, ["dp0001"]) == [f"{other}: holds the bytes of dp0000.safetensors: files were exchanged"]


def test_tensors_exchanged_within_a_file_are_named(place: Place) -> None:
    path = write(place, 4)
    file = path / "dp0000.safetensors"
    damage(file, lambda data: data.__setitem__(slice(-2006, None), data[-1006:-6] + data[-2006:-1006] + data[-6:]))
    assert f"damaged: {UNITS[0]}#master[0:250), {UNITS[0]}#exp_avg[0:250))" in verify(path)[0]


def test_what_is_set_aside_is_kept_when_the_step_is_written_anew(place: Place) -> None:
    for why in ("corrupt", "abandoned", "corrupt"):
        path = write(place, 4)
        (path / "dp0000.safetensors").write_bytes(why.encode())
        moved = set_aside(path, why)
        assert moved is not None
        assert (moved / "dp0000.safetensors").read_bytes() == why.encode()
        assert steps(place) == []
        assert set_aside(path, why) is None
    write(place, 4)
    assert steps(place) == [4]
    assert verify(place / "step-4") == []
    kept = {p.name: (p / "dp0000.safetensors").read_bytes() for p in place.iterdir() if "." in p.name}
    assert kept == {"step-4.corrupt": b"corrupt", "step-4.abandoned": b"abandoned", "step-4.corrupt2": b"corrupt"}


def test_a_damaged_one_of_the_same_step_makes_way(place: Place) -> None:
    (write(place, 6) / "dp0000.safetensors").write_bytes(b"")
    assert verify(write(place, 6)) == []
    assert (place / "step-6.corrupt" / "dp0000.safetensors").read_bytes() == b""


def test_newer_ones_are_abandoned(place: Place) -> None:
    for step in (2, 4, 6):
        write(place, step)
    assert len(abandon_newer(place, 3)) == 2
    assert steps(place) == [2]
    quarantine(place / "step-2")
    assert steps(place) == []


def test_old_ones_go_only_after_the_newest_was_read_back(place: Place) -> None:
    for step in (2, 4, 6, 8):
        newest = write(place, step)
    good = (newest / "dp0000.safetensors").read_bytes()
    damage(newest / "dp0000.safetensors", lambda data: data.__setitem__(-1, data[-1] ^ 1))
    with pytest.raises(RecoveryError, match="nothing was deleted"):
        retain(place, 2, newest)
    (newest / "dp0000.safetensors").write_bytes(good)
    assert retain(place, 2, newest) == [2, 4]
    assert steps(place) == [6, 8]
    assert {p.name for p in place.iterdir()} == {"latest", "step-6", "step-8"}


def test_permanent_ones_are_never_removed(place: Place) -> None:
    """By the present interval, and by the one that they were written under."""
    for step in range(1, 10):
        newest = write(place, step, permanent=step == 2)
    assert retain(place, 2, newest, permanent_every=3) == [1, 4, 5, 7]
    assert steps(place) == [2, 3, 6, 8, 9]
    assert retain(place, 1, newest, permanent_every=0) == [3, 6, 8]
    assert steps(place) == [2, 9]


def test_what_a_killed_writer_left_is_cleaned(place: Place) -> None:
    class Killed(BaseException):
        pass

    write(place, 4)
    damaged = write(place, 2)
    (damaged / "manifest.json").unlink()

    def kill(written: int, total: int) -> None:
        raise Killed

    for storage in (LocalStorage, type(place_storage(place))):
        storage.abort, kept = lambda *_: None, storage.abort  # type: ignore[method-assign,assignment]
        try:
            with pytest.raises(Killed):
                write(place, 6, kill)
        finally:
            storage.abort = kept  # type: ignore[method-assign]
    assert any(p.name.startswith("step-6") for p in place.iterdir())
    assert steps(place) == [4]
    clean_unfinished(place)
    assert {p.name for p in place.iterdir()} == {"latest", "step-2", "step-4"}, "only what no writer finished goes"
    write(place, 6)
    assert steps(place) == [4, 6]


def place_storage(place: Place) -> object:
    from checkpointing.storage import storage_of

    return storage_of(place)


def test_too_little_room_is_found_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 4)
    monkeypatch.setattr(LocalStorage, "free_bytes", lambda *_: 4000)
    with pytest.raises(OSError, match=r"the checkpoint has 4,012 bytes, and 4,000 are free") as raised:
        write(tmp_path, 6, lambda written, total: pytest.fail("it wrote"))
    assert raised.value.errno == errno.ENOSPC
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-4"]


def test_a_store_that_does_not_answer_is_not_taken_for_an_empty_one(
    remote: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(remote, 4)

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no route to host")

    for name in ("info", "cat_file", "open", "ls"):
        with monkeypatch.context() as patched:
            patched.setattr(type(remote.fs), name, refuse)
            with pytest.raises(UnreachableError, match="no route to host") as raised:
                list_checkpoints(remote) if name != "open" else verify(path)
            assert str(raised.value.filename).startswith(str(remote))
    assert steps(remote) == [4]


def test_a_marker_that_stayed_behind_takes_nothing_from_a_checkpoint(remote: RemotePath) -> None:
    path = write(remote, 4)
    (path / "unfinished").write_bytes(b"")
    assert steps(remote) == [4]
    clean_unfinished(remote)
    assert verify(path) == []


def test_places_are_paths_unless_they_are_urls(tmp_path: Path) -> None:
    assert place_of("a/b") == Path("a/b")
    assert place_of(tmp_path) == tmp_path
    assert place_of("file:///a/b") == place_of("local:///a/b") == Path("/a/b")
    assert str(place_of("memory://a/b/") / "c") == "memory://a/b/c"
    for url, words in (("nothing://x", "Protocol not known: nothing"), ("abfs://x", "adlfs"), ("://x", "no protocol")):
        with pytest.raises(LocationError, match=words):
            place_of(url)


def test_manifests_say_when_they_were_written(tmp_path: Path) -> None:
    manifest = json.loads((write(tmp_path, 4) / "manifest.json").read_bytes())
    assert manifest["written_at"] > 1.7e9
    assert all(len(facts["tensors"]) == 16 * 4 for facts in manifest["files"].values())
