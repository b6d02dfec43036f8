"""Rows of several processes never mix, torn rows are left out, and faults are read strictly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from trainer.events import FILE_NAME, EventLog, read_events
from trainer.faults import POINTS, FaultError, KillSpec, format_attempts, parse_attempts

ROOT = Path(__file__).resolve().parents[2]


def test_row_format(tmp_path: Path) -> None:
    with EventLog(tmp_path / "runs" / "a", rank=1, attempt=2) as log:
        log.write(
            "step", step=7, loss=1.5, path=Path("x"), text="café\n", bad=float("nan"), nested={"a": [float("inf")]}
        )
        log.write("done")
    first, second = read_events(tmp_path / "runs" / "a")
    assert list(first)[:6] == ["v", "time", "rank", "attempt", "step", "kind"]
    assert (first["v"], first["rank"], first["attempt"], first["step"], first["kind"]) == (1, 1, 2, 7, "step")
    assert first["loss"] == 1.5
    assert first["path"] == "x"
    assert first["text"] == "café\n"
    assert first["bad"] == "nan"
    assert first["nested"] == {"a": ["inf"]}
    assert second["step"] is None
    assert second["time"] >= first["time"]


def test_a_full_disk_loses_rows_and_says_so_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / FILE_NAME).symlink_to("/dev/full")
    with EventLog(tmp_path, 0, 0) as log:
        log.write("one")
        log.write("two")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "events are being lost (No space left on device)" in said


def test_no_file_means_no_events(tmp_path: Path) -> None:
    assert read_events(tmp_path) == []


def test_torn_lines_are_left_out_and_do_not_swallow_the_next_row(tmp_path: Path) -> None:
    with EventLog(tmp_path, 0, 0) as log:
        log.write("one")
        log.write("two")
    path = tmp_path / FILE_NAME
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert [row["kind"] for row in read_events(tmp_path)] in ([], ["one"], ["one", "two"])
        with EventLog(tmp_path, 0, 1) as log:
            log.write("three")
        assert read_events(tmp_path)[-1]["kind"] == "three", cut
    path.write_bytes(whole + b'\xff\xfe{"kind": 3}\n[1]\n{"rank": 0}\n\x00\x00\n')
    assert [row["kind"] for row in read_events(tmp_path)] == ["one", "two"]


WRITER = """
import sys
from trainer.events import EventLog
log = EventLog(sys.argv[1], int(sys.argv[2]), 0)
for i in range(400):
    log.write("row", step=i, text="x" * (i * 7 % 900))
print("written", flush=True)
while True:
    log.write("more", text="y" * 300)
"""


def test_rows_of_processes_that_are_killed_stay_whole(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(rank)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for rank in range(3)
    ]
    guard = threading.Timer(60, lambda: [writer.kill() for writer in writers])
    guard.start()
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "written\n"
    finally:
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.communicate(timeout=10)
        guard.cancel()
    # A kill can cut the row that is being written; a writer that starts while another's row grows ends that line once
    # more, which leaves an empty one.
    lines = [line for line in (tmp_path / FILE_NAME).read_bytes().splitlines() if line]
    rows = read_events(tmp_path)
    assert len(lines) - len(writers) <= len(rows) <= len(lines)
    for rank in range(3):
        assert [row["step"] for row in rows if row["rank"] == rank and row["kind"] == "row"] == list(range(400))


def test_kill_spec_round_trip() -> None:
    assert KillSpec.parse("rank=1,step=7") == KillSpec(1, 7, "forward", "worker")
    for at in POINTS:
        for who in ("worker", "keeper", "both"):
            spec = KillSpec(rank=3, step=12, at=at, who=who)
            assert KillSpec.parse(str(spec)) == spec


def test_kills_of_several_attempts_round_trip() -> None:
    text = "rank=0,step=3,at=told,who=keeper+rank=1,step=5,at=seal,who=worker;;rank=1,step=1,at=recovery,who=both"
    attempts = parse_attempts(text)
    assert [len(kills) for kills in attempts] == [2, 0, 1]
    assert format_attempts(attempts) == text
    assert parse_attempts("") == ((),)
    assert attempts[2][0].is_at("recovery", 7)
    assert not attempts[0][0].is_at("told", 2)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "'' is no field"),
        ("rank=1", "step is missing"),
        ("step=1", "rank is missing"),
        ("rank=one,step=1", "rank='one' is not a whole number"),
        ("rank=-1,step=1", "rank='-1'"),
        ("rank=1,step=0", "step=0 is too small"),
        ("rank=1,step=²", "step='²'"),
        ("rank=1,step=1,at=lunch", "at='lunch' is no point"),
        ("rank=1,step=1,who=me", "who='me' is nobody"),
        ("rank=1,step=1,when=now", "'when=now' is no field"),
        ("rank=1,rank=2,step=1", "rank is given twice"),
    ],
)
def test_bad_kill_spec_names_the_field(text: str, part: str) -> None:
    with pytest.raises(FaultError) as error:
        KillSpec.parse(text)
    assert str(error.value).startswith("kill: ")
    assert part in str(error.value)
