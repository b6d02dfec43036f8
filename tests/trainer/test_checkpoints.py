"""`planaria checkpoint ls | verify | diff | rm`, as a user meets them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from checkpointing import heldout
from checkpointing.records import Entry
from checkpointing.storage import place_of
from checkpointing.store import list_checkpoints, set_aside, write_checkpoint
from checkpointing.tensorfile import Section
from checkpointing.units import Range
from trainer.checkpoints import age, memory_rows, split_step
from trainer.cli import main
from trainer.recipe import load_recipe, recipe_to_yaml

UNITS = ("L00.E000.down_proj", "L00.E001.down_proj")


def write(place, step: int, change: float = 0.0, metadata=None) -> Path:
    parts = {}
    for rank, unit in enumerate(UNITS):
        values = np.arange(100, dtype=np.float32) + rank + change
        parts[f"dp{rank:04d}"] = [
            Section([Entry(Range(unit, "master", 0, 100), "float32", 0, 400)], memoryview(values).cast("B"))
        ]
    return write_checkpoint(place, step, parts, {unit: {"elements": 100} for unit in UNITS}, metadata or {})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with steps 2, 4 and 6."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe_to_yaml(load_recipe("recipes/quickstart.yaml")))
    for step in (2, 4, 6):
        write(folder / "checkpoints", step)
    return folder


def steps(run: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(run / "checkpoints")]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_ls_shows_what_is_there_and_what_is_not_a_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = run / "checkpoints"
    write(checkpoints, 8, metadata={"permanent": True})
    set_aside(checkpoints / "step-2", "corrupt")
    (checkpoints / "step-4" / "manifest.json").unlink()
    (checkpoints / "step-6" / "dp0001.safetensors").write_bytes(b"short")
    (checkpoints / "step-10.tmp").mkdir()
    (checkpoints / "latest").write_text("step-99\n")
    assert main(["checkpoint", "ls", str(run)]) == 0
    place, header, *lines = capsys.readouterr().out.splitlines()
    assert place == str(checkpoints)
    assert header.split() == ["step", "size", "kept", "tier", "age", "state"]
    cells = {line.split()[0]: line for line in lines}
    assert set(cells) == {"4", "6", "8", "step-2.corrupt", "step-10.tmp"}
    assert "no checkpoint: it has no manifest.json" in cells["4"]
    assert "damaged: " in cells["6"]
    assert "dp0001.safetensors" in cells["6"]
    assert cells["8"].split() == ["8", "1.1", "KiB", "permanent", "disk", *cells["8"].split()[5:7], "whole"]
    assert "set aside: corrupt" in cells["step-2.corrupt"]
    assert "unfinished" in cells["step-10.tmp"]


def test_a_file_in_a_steps_place_does_not_hide_the_others(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "step-9").write_text("x")
    assert main(["checkpoint", "ls", str(run)]) == 0
    out = capsys.readouterr().out
    assert "no checkpoint: it is no folder" in out
    assert out.count("whole") == 3


def test_rm_of_a_link_leaves_what_it_leads_to(run: Path, tmp_path: Path) -> None:
    link = run / "checkpoints" / "step-2"
    link.rename(tmp_path / "elsewhere")
    link.symlink_to(tmp_path / "elsewhere")
    assert main(["checkpoint", "rm", str(run), "2"]) == 0
    assert steps(run) == [4, 6]
    assert (tmp_path / "elsewhere" / "manifest.json").is_file()


def test_rm_says_what_could_not_be_removed(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    assert main(["checkpoint", "rm", str(run), "2"]) == 2
    streams = capsys.readouterr()
    assert "step-2 cannot be removed whole" in streams.err
    assert "removed" not in streams.out


def test_what_the_newest_is_taken_for_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "step-6" / "manifest.json").write_text("")
    assert main(["checkpoint", "diff", str(run), f"{run}:4"]) == 0
    streams = capsys.readouterr()
    assert streams.err.startswith("step 6 is passed over: ")
    assert "A: " + str(run / "checkpoints" / "step-4") in streams.out


def test_ls_tells_windows_and_mixed_ages_from_whole_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def section(kind: str, step: int | None) -> Section:
        entry = Entry(Range(UNITS[0], kind, 0, 2), "float32", 0, 8)
        return Section([entry], memoryview(bytes(8)), step)

    write_checkpoint(tmp_path, 2, {"dp0000": [section("master", None)]}, {}, {})
    write_checkpoint(tmp_path, 4, {"dp0000": [section("master", 3), section("grad", 4)]}, {}, {})
    write_checkpoint(tmp_path, 6, {"dp0000": [section("master", 5)]}, {}, {})
    assert main(["checkpoint", "ls", str(tmp_path)]) == 0
    states = [line.split(" s  ")[-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert states == ["whole", "window of the log", "of several steps"]
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0


def test_permanence_is_also_the_recipes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "recipe.yaml").write_text(
        recipe_to_yaml(load_recipe("recipes/quickstart.yaml", ["checkpoint.disk={every: 2, permanent_every: 4}"]))
    )
    main(["checkpoint", "ls", str(run)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(row[0], row[3]) for row in rows] == [("2", "ephemeral"), ("4", "permanent"), ("6", "ephemeral")]
    assert main(["checkpoint", "rm", str(run), "4"]) == 2
    assert "step-4 is permanent" in capsys.readouterr().err


def test_a_url_and_a_bare_folder_will_do(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"dir::file://{tmp_path / 'far'}"
    write(place_of(url), 4)
    set_aside(write(place_of(url), 6), "abandoned")
    assert main(["checkpoint", "ls", url]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == url
    assert "set aside: abandoned" in out
    assert main(["checkpoint", "verify", url, "4"]) == 0
    assert main(["checkpoint", "diff", f"{url}:4", f"{run / 'checkpoints'}:2"]) == 0
    assert main(["checkpoint", "rm", url, "6"]) == 0
    assert [p.name for p in place_of(url).iterdir()] == ["latest", "step-4"]


def test_the_recipe_says_where_they_lie(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    far = tmp_path / "far"
    (run / "recipe.yaml").write_text(
        recipe_to_yaml(load_recipe("recipes/quickstart.yaml", [f"checkpoint.disk.url={far}"]))
    )
    assert main(["checkpoint", "ls", str(run)]) == 0
    assert capsys.readouterr().out.startswith(f"{far}\nno checkpoints: the place does not exist")
    far.mkdir()
    assert main(["checkpoint", "ls", str(run)]) == 0
    assert capsys.readouterr().out == f"{far}\nno checkpoints\n"


def test_a_url_at_which_there_is_nothing_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"dir::file://{tmp_path / 'mistyped'}"
    for arguments in (["ls", url], ["verify", url], ["rm", url, "4"], ["diff", url, url]):
        assert main(["checkpoint", *arguments]) == 2
        error = capsys.readouterr().err
        assert error == f"{url} does not exist; name a run folder, or a folder or URL of checkpoints\n"


def test_verify_reads_every_byte(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["step 2", "step 4", "step 6"]
    flip(run / "checkpoints" / "step-4" / "dp0001.safetensors")
    assert main(["checkpoint", "verify", str(run)]) == 1
    out = capsys.readouterr().out
    assert "step 4: damaged" in out
    assert (
        f"step-4/dp0001.safetensors: its bytes do not match the checksum in manifest.json (damaged: {UNITS[1]}#" in out
    )
    assert main(["checkpoint", "verify", str(run), "6"]) == 0
    assert steps(run) == [2, 4, 6], "nothing was moved"
    assert main(["checkpoint", "verify", str(run), "4", "--quarantine"]) == 1
    assert "set aside as" in capsys.readouterr().out
    assert steps(run) == [2, 6]
    assert (run / "checkpoints" / "step-4.corrupt").is_dir()


def test_verify_names_what_went_with_a_missing_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "step-6" / "dp0000.safetensors").unlink()
    assert main(["checkpoint", "verify", str(run), "6"]) == 1
    out = capsys.readouterr().out
    assert "step-6/dp0000.safetensors: No such file or directory" in out
    assert f"lacks {UNITS[0]}#master[0:100)" in out
    (run / "checkpoints" / "step-6" / "manifest.json").unlink()
    assert main(["checkpoint", "verify", str(run), "6"]) == 1
    assert "manifest.json" in capsys.readouterr().out


def test_diff_measures_what_changed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "diff", f"{run}:2", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [f"B: {run}/checkpoints/step-6", "2 equal, 0 different"]
    write(run / "checkpoints", 8, change=0.5)
    assert main(["checkpoint", "diff", str(run), f"{run}:2", "--all"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == f"{UNITS[0]}#master  max abs difference 0.5, 100 of 100 elements"
    assert lines[-1] == "0 equal, 2 different"


def test_rm_says_what_it_removed_and_keeps_the_newest_that_verifies(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "rm", str(run), "6"]) == 2
    assert "the newest checkpoint that verifies" in capsys.readouterr().err
    flip(run / "checkpoints" / "step-6" / "dp0001.safetensors")
    assert main(["checkpoint", "rm", str(run), "2", "4"]) == 2
    assert steps(run) == [2, 4, 6], "all or nothing"
    assert main(["checkpoint", "rm", str(run), "6", "2"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"removed {run}/checkpoints/step-6 (")
    assert steps(run) == [4]
    set_aside(run / "checkpoints" / "step-4", "corrupt")
    (run / "checkpoints" / "step-9.tmp").mkdir()
    assert main(["checkpoint", "rm", str(run), "step-4.corrupt", "step-9.tmp"]) == 0
    write(run / "checkpoints", 10)
    assert main(["checkpoint", "rm", str(run), "10", "--force"]) == 0
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest"]


def test_the_best_is_protected_if_it_can_be_used(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step, loss in ((2, 1.0), (4, 2.0), (6, 3.0)):
        heldout.record(run, step, loss, "samples")
    assert main(["checkpoint", "rm", str(run), "2"]) == 2
    assert "step-2 has the lowest held-out loss" in capsys.readouterr().err
    flip(run / "checkpoints" / "step-2" / "dp0001.safetensors")
    assert main(["checkpoint", "rm", str(run), "4"]) == 2
    assert "step-4 has the lowest held-out loss" in capsys.readouterr().err
    assert main(["checkpoint", "rm", str(run), "2"]) == 0
    assert steps(run) == [4, 6]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["ls", "{}/nowhere"], "is neither a run folder nor"),
        (["ls", "nothing://x"], "Protocol not known"),
        (["verify", "{}/run", "5"], "has no step 5"),
        (["diff", "{}/run:5", "{}/run"], "step 5 of"),
        (["rm", "{}/run", "5"], "steps there: step-2, step-4, step-6"),
        (["rm", "{}/run", "../recipe.yaml"], "is no step and no folder of one"),
        (["rm", "{}/run", "step-2/../.."], "is no step and no folder of one"),
    ],
)
def test_mistakes_are_said_in_a_line(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    assert main(["checkpoint", *(a.format(run.parent) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert part in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["verify", "x", "four"], ["rm", "x"], ["fly", "x"], []])
def test_arguments_are_checked(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["checkpoint", *arguments])
    assert left.value.code == 2


@pytest.mark.drill
def test_what_the_live_keeper_holds_is_listed_and_its_write_protected(tmp_path: Path) -> None:
    code = """
import sys, torch
from checkpointing.capture import Capturer
from checkpointing.keeper.client import KeeperClient
from checkpointing.keeper.control import keeper_status, stop_keeper
from checkpointing.protection import dense
from checkpointing.state.buffers import StateBuffer, StateSpan
from checkpointing.units import Range
from trainer.cli import main
run = sys.argv[1]
buffers = [StateBuffer("b", torch.arange(8.0), (StateSpan(Range("norm", "master", 0, 8), 0),))]
protection = dense(buffers, 4)
client = KeeperClient.attach(run, "dp0000", ["dp0000"], protection.shape, "f" * 16, rules=protection.rules,
                             disk={"every": 2, "keep_last": 2}, disk_fault={"kind": "hang", "seconds": 5})
capturer = Capturer(client, buffers, protection.log)
for step in (1, 2, 3):
    capturer.start(step, {}, step - 1, protection.fragments)
    capturer.wait_copied()
    capturer.wait_sealed(step)
while not keeper_status(run)[1]["disk"]["writing"].get("written"):
    pass
try:
    main(["checkpoint", "ls", run])
    print(main(["checkpoint", "rm", run, "step-2.tmp"]))
finally:
    client.close()
    capturer.close()
    stop_keeper(run, persist=False)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "being written by the keeper" in done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "2"
    rows = [line.split() for line in lines]
    assert [row[0] for row in rows if "sealed" in row] == ["1", "2", "3"]
    assert any("writing step 2" in line for line in lines)


def test_steps_that_not_all_hold_are_said() -> None:
    keeps = {"dp0000": {"steps": [6, 7]}, "dp0001": {"steps": [6]}}
    assert [(row.step, row.state) for row in memory_rows({"keeps": keeps})] == [
        ("6", "sealed"),
        ("7", "on dp0000 only"),
    ]


def test_steps_and_urls_are_told_apart() -> None:
    assert split_step("runs/x:40") == ("runs/x", 40)
    assert split_step("s3://bucket/x") == ("s3://bucket/x", None)
    assert split_step("s3://bucket/x:40") == ("s3://bucket/x", 40)
    assert split_step(":40") == (":40", None)


def test_ages_are_round() -> None:
    assert [age(s) for s in (0.4, 119, 120, 7200, 3 * 86400)] == ["0 s", "119 s", "2 min", "2 h", "3 d"]


def test_old_manifests_without_a_date_are_listed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from checkpointing.manifest import manifest_checksum

    path = run / "checkpoints" / "step-2" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["written_at"]
    for facts in manifest["files"].values():
        del facts["tensors"]
    path.write_text(json.dumps(manifest | {"checksum": manifest_checksum(manifest)}))
    assert main(["checkpoint", "ls", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[-2:] == ["disk", "whole"]
    assert main(["checkpoint", "verify", str(run), "2"]) == 0
