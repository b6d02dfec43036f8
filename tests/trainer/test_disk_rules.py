"""The keys of checkpoint.disk, where they lead, and what drills do to the disk."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from checkpointing.remote import RemotePath
from checkpointing.store import write_checkpoint
from trainer.events import EventLog
from trainer.failpoints import DISK_VARIABLE, Failpoints
from trainer.faults import DiskFaultSpec, FaultError
from trainer.plan_card import card
from trainer.recipe import RecipeError, load_recipe, recipe_fingerprint, recipe_to_yaml
from trainer.runfolder import check_place, checkpoints_of, run_folder
from trainer.schema import Recipe


def quickstart(*overrides: str) -> Recipe:
    return load_recipe("recipes/quickstart.yaml", overrides)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("checkpoint.disk={every: 0, permanent_every: 10}", "set checkpoint.disk.every"),
        (
            "checkpoint.disk={every: 4, permanent_every: 10}",
            "not a multiple of checkpoint.disk.every=4; choose e.g. 12",
        ),
        ("checkpoint.disk.permanent_every=-1", "checkpoint.disk.permanent_every must be at least 0"),
        ("checkpoint.disk.url=nowhere://x", "Protocol not known: nowhere"),
        ("checkpoint.disk.url=abfs://x", "adlfs"),
        ("checkpoint.disk.url=memory://x", "ends with its process"),
        ("checkpoint.disk.url=simplecache::memory://x", "ends with its process"),
        ("checkpoint.load_from=nowhere://x", "checkpoint.load_from: nowhere://x: Protocol not known"),
        ("checkpoint.disk.hung_after_s=0", "checkpoint.disk.hung_after_s must be more than 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(override: str, words: str) -> None:
    with pytest.raises(RecipeError) as refused:
        quickstart(override)
    assert words in str(refused.value)


def test_a_local_url_becomes_absolute_and_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe_path = Path("recipes/quickstart.yaml").resolve()
    monkeypatch.chdir(tmp_path)
    for url in ("there", f"file://{tmp_path}/there"):
        recipe = load_recipe(recipe_path, [f"checkpoint.disk.url={url}"])
        assert recipe.checkpoint.disk.url == str(tmp_path / "there")
        assert checkpoints_of(recipe, Path("run")) == tmp_path / "there"
    assert checkpoints_of(load_recipe(recipe_path), Path("run")) == Path("run/checkpoints")
    written = tmp_path / "again.yaml"
    written.write_text(recipe_to_yaml(recipe))
    assert load_recipe(written) == recipe


def test_another_url_stays_as_it_is_and_changes_no_bits() -> None:
    recipe = quickstart("checkpoint.disk.url=dir::file:///x/y")
    assert checkpoints_of(recipe, Path("run")) == RemotePath("dir::file:///x/y")
    assert recipe_fingerprint(recipe) == recipe_fingerprint(quickstart())


def test_a_place_of_another_recipe_is_refused(tmp_path: Path) -> None:
    recipe = quickstart(f"checkpoint.disk.url={tmp_path}")
    check_place(recipe)
    write_checkpoint(tmp_path, 2, {}, {}, {"recipe": recipe_fingerprint(recipe)})
    check_place(recipe)
    write_checkpoint(tmp_path, 4, {}, {}, {"recipe": "f" * 16})
    with pytest.raises(RecipeError, match=r"step-4 was written by a run of recipe f{16}.*a place of its own"):
        check_place(recipe)
    check_place(quickstart())
    assert run_folder(recipe) == Path("runs/quickstart")


def test_a_place_that_does_not_answer_is_refused_at_the_first_start_only(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        recipe = quickstart(f"checkpoint.disk.url=ftp://127.0.0.1:{taken.getsockname()[1]}/x", f"log.dir={tmp_path}")
        with pytest.raises(RecipeError, match=r"checkpoint\.disk\.url: ftp://127.* cannot be read: .*correct it"):
            check_place(recipe)
        with EventLog(run_folder(recipe), 0, 0) as events:
            events.write("start")
        check_place(recipe)  # memory may do without it


def test_the_card_says_what_stays() -> None:
    recipe = quickstart("checkpoint.disk={every: 5, permanent_every: 20, url: /x}")
    assert "disk tier    every 5 steps, the last 2, multiples of 20 for good, in /x" in card(
        recipe, num_files=1, num_bytes=1
    )


def test_disk_faults_round_trip_to_the_keeper(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("kind=throttle,bytes_per_s=1000000", "kind=full,first=4,last=6", "kind=hang,seconds=9"):
        spec = DiskFaultSpec.parse(text)
        assert DiskFaultSpec.parse(str(spec)) == spec
    monkeypatch.setenv(DISK_VARIABLE, "kind=full,first=4")
    assert Failpoints.disk_fault() == {"kind": "full", "bytes_per_s": 0, "seconds": 0, "first": 4, "last": -1}
    monkeypatch.delenv(DISK_VARIABLE)
    assert Failpoints.disk_fault() is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kind=melt", "kind='melt' is unknown; choose throttle, full, hang"),
        ("kind=throttle", "throttle needs bytes_per_s=N"),
        ("kind=hang,seconds=-2", "hang needs seconds=N"),
        ("kind=hang,seconds=x", "seconds='x' is not a whole number"),
        ("full", "'full' is no field"),
    ],
)
def test_bad_disk_faults_name_the_field(text: str, words: str) -> None:
    with pytest.raises(FaultError) as refused:
        DiskFaultSpec.parse(text)
    assert words in str(refused.value)
