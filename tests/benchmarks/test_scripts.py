"""The benchmarks run to their end on a CPU, and what they recover is what was lost."""

import json
import os
from tempfile import TemporaryFile

import pytest

from tests.forked import run_program, run_workers, start


def run(name, *options, timeout):
    """What ``benchmarks.NAME`` prints, started by itself."""
    with TemporaryFile("w+") as output:
        process = start(run_program, f"benchmarks.{name}", options, output=output.fileno())
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        output.seek(0)
        printed = output.read()
    assert status == 0, printed[-3000:]
    return printed


@pytest.mark.slow
def test_checkpoint_compares_and_recovers_exactly(tmp_path):
    work, out = tmp_path / "work", tmp_path / "result.json"
    work.mkdir()
    options = ["--config", "tiny", "--work", work, "--json", out]
    printed, _ = run_workers(2, "benchmarks.checkpoint", *options, timeout_s=150)
    result = json.loads(out.read_text())
    summary = result["summary"]
    arms = {"wal", "dense", "dcp async", "deepspeed save"}
    assert set(summary["rows"]) == arms, result["skipped"]
    assert set(summary["recoveries"]) == arms, result["skipped"]
    assert all(row["exact"] for row in summary["recoveries"].values())
    assert summary["recoveries"]["wal"]["redone"] > 0, "the log was not used"
    assert result["machine"]["versions"]["torch"] != "absent"
    assert result["ceilings"]["disk"]["write_fsync"] > 0
    assert "recovery" in printed
    assert not os.listdir(work), "run folders and saves are left behind"


@pytest.mark.slow
def test_expert_parallel_counts_fewer_bytes_and_times_every_arm(tmp_path):
    out = tmp_path / "result.json"
    options = ["--config", "cpu", "--rounds", "1", "--json", out]
    printed, _ = run_workers(2, "benchmarks.expert_parallel", *options, timeout_s=100)
    routings = json.loads(out.read_text())["routings"]
    for found in routings.values():
        assert found["summary"]["fewer_bytes"] >= 3.5
        assert found["summary"]["arms"]["ep1"]["throughput"] == 1
        assert set(found["summary"]["arms"]) == {"ep1", "all_to_all", "deduplicated"}
        assert found["limits"]["link_gbps"] > 0
    # Counted, not computed: at K choices of E experts on two ranks, T*K/2 rows travel one way and as many back.
    sent = routings["balanced"]["bytes"]["all_to_all"]["forward"]["bytes"]
    assert sent == pytest.approx(2 * 2 * 512 * 4 * 256 * 4, rel=0.05)
    assert "fewer bytes" in printed


def test_host_memory_measures_every_kind_of_pages(tmp_path):
    out = tmp_path / "memory.json"
    options = ["--gib", "0.0625", "--copied-gib", "0.0625", "--json", str(out)]
    run("host_memory", *options, timeout=80)
    result = json.loads(out.read_text())
    for pages in ("4k", "advised", "hugetlb"):
        found = result[f"0.0625 GiB, {pages}"]
        assert "unavailable" in found or found["map_populate_s"] > 0
    assert result["0.0625 GiB, 4k"]["prefault_s"] > 0


def test_contention_measures_every_loop_beside_every_load(tmp_path):
    out = tmp_path / "contention.json"
    options = ["--gib", "0.01", "--hashers", "1", "--rounds", "1", "--turns", "40", "--json", str(out)]
    printed = run("contention", *options, timeout=80)
    found = json.loads(out.read_text())["us"]
    assert set(found) == {"0", "1"}
    for loads in found.values():
        assert set(loads) == {"alone", "copies of 1 MiB", "copies of 4 MiB", "copies of 32 MiB"}
        assert all(us > 0 for loops in loads.values() for us in loops.values())
    assert "beside 1 hashing threads" in printed


def test_moe_layer_compares_every_arm_that_runs_here(tmp_path):
    out = tmp_path / "layer.json"
    options = ["--config", "tiny", "--rounds", "2", "--json", str(out)]
    printed = run("moe_layer", *options, timeout=110)
    (layer,) = json.loads(out.read_text())["layers"].values()
    for routing in ("balanced", "skewed"):
        rows = layer[routing]
        assert {"transformers eager", "transformers grouped_mm", "ours grouped_mm", "ours minimal"} <= set(rows)
        assert "DeepSpeed MoE cf=1.25" in rows, layer["skipped"]
        assert all(max(row["error"].values()) < 1e-6 for row in rows.values() if row["exact"])
        assert rows["ours minimal"]["saved_bytes"] < rows["transformers grouped_mm"]["saved_bytes"]
    assert layer["ceiling_flops"] > 0
    assert "left out: ScatterMoE: it needs a CUDA device" in printed
