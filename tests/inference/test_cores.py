"""Cores against made-up control groups."""

from __future__ import annotations

import pytest

from inference.cores import cpu_cores, last_cache_bytes


@pytest.fixture
def cores(tmp_path, monkeypatch):
    """What is found on 64 cores: from the text of /proc/self/cgroup, and files by name."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))

    def find(own: str, files: dict[str, str]) -> int:
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            file = tmp_path / "groups" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return cpu_cores(tmp_path / "groups", tmp_path / "own")

    return find


def test_a_quota_of_any_group_above_counts(cores):
    assert cores("0::/a/b\n", {"a/b/cpu.max": "max 100000\n"}) == 64
    assert cores("0::/a/b\n", {"a/cpu.max": "250000 100000\n"}) == 2
    assert cores("0::/a/b\n", {"a/b/cpu.max": "50000 100000\n"}) == 1, "half a core is one thread"
    assert cores("0::/a/b\n", {"a/b/cpu.max": "9900000 100000\n", "a/cpu.max": "max 100000\n"}) == 64


def test_older_control_groups_are_read(cores):
    own = "5:memory:/m\n4:cpu,cpuacct:/a\n"
    assert cores(own, {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}) == 64
    assert cores(own, {"cpu/a/cpu.cfs_quota_us": "300000\n"}) == 3


def test_without_control_groups_all_cores_count(tmp_path):
    assert cpu_cores(tmp_path, tmp_path / "none") > 0


def test_the_last_cache_is_the_largest(tmp_path):
    assert last_cache_bytes(tmp_path) == 0
    for index, size in enumerate(("48K", "2048K", "307200K", "unknown")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert last_cache_bytes(tmp_path) == 300 << 20
