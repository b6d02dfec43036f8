"""Expert parallelism under DeepSpeed against one process, on real gloo ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from checkpointing.units import Range, overlaps, uncovered
from trainer.launch import worker_environment

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ep")
    found = {}
    for world, ep, zero in [(1, 1, 1), (2, 2, 1), (4, 2, 2)]:
        out = folder / f"{world}.json"
        worker = [str(HERE / "ep_worker.py"), str(out), str(ep), str(zero)]
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", "--max-restarts=0"]
        command = [sys.executable, *torchrun, *worker]
        environment = {**worker_environment(world), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, timeout=150, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:6000]
        found[world] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_losses_equal_one_process_on_every_step(reports, world):
    one, many = reports[1], reports[world]
    assert len(one["losses"]) == 20
    for step, (want, got) in enumerate(zip(one["losses"], many["losses"], strict=True), 1):
        assert abs(got - want) <= 1e-5 * abs(want), f"step {step}: {got} against {want}"
    assert many["norm"] == pytest.approx(one["norm"], rel=1e-4)
    assert one["losses"][-1] < one["losses"][0] - 0.01, "nothing was learned: the comparison would be empty"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_restoring_the_buffers_replays_the_same_bits(reports, world):
    report = reports[world]
    assert report["again"] == report["losses"][10:]
    assert report["replayed"] == report["final"]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_one_flipped_bit_on_the_last_rank_changes_the_state_hash(reports, world):
    assert reports[world]["flipped"] != reports[world]["replayed"]


@pytest.mark.parametrize("world", [2, 4])
def test_every_element_of_the_model_is_named_exactly_once_over_all_ranks(reports, world):
    ranges = [Range.parse(text) for rank in reports[world]["ranges"] for text in rank]
    whole = [
        Range(unit, kind, 0, size)
        for unit, size in reports[1]["local_units"].items()
        for kind in ("master", "exp_avg", "exp_avg_sq")
    ]
    assert not overlaps(ranges)
    assert not uncovered(whole, ranges)
    assert not uncovered(ranges, whole), "a rank names state that is not the model's"
