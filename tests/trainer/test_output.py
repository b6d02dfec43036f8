"""A run whose output nobody reads any more goes on."""

from __future__ import annotations

import os
import sys

import pytest

from trainer.output import LastingStream, lasting_output


def test_a_closed_pipe_and_a_full_disk_are_said_once_and_forgotten(capfd: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    for descriptor in (writer, os.open("/dev/full", os.O_WRONLY)):
        with open(descriptor, "w") as broken:
            stream = LastingStream(broken, "standard output", sys.stderr)
            for _ in range(3):
                print("x" * 100_000, file=stream)
                print("x", file=stream, flush=True)
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("standard output: Broken pipe; the run goes on")
    assert second.startswith("standard output: No space left on device; the run goes on")


def test_what_can_be_written_is_and_the_streams_come_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with lasting_output():
        print("out", flush=True)
        print("err", file=sys.stderr)
        assert sys.stdout.encoding == before[0].encoding
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr() == ("out\n", "err\n")


def test_what_was_held_back_cannot_fail_later(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        with lasting_output():
            print("done")  # less than a buffer
        broken.flush()
