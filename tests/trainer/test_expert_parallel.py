"""Expert parallelism under DeepSpeed against one process, on real gloo ranks."""

import json

import pytest

from checkpointing.partial import Experts, select
from checkpointing.units import Range, expert_of, overlaps, uncovered
from tests.checkpointing.placement import bytes_per_rank, imbalance, zero_placement
from tests.forked import run_ranks
from tests.trainer import ep_worker

ACCUMULATED = "accumulated"  # one rank, two micro-batches a step


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ep")
    found = {}
    for name, world, ep, zero, accumulation in [
        (1, 1, 1, 1, 1), (2, 2, 2, 1, 1), (4, 4, 2, 2, 1), (ACCUMULATED, 1, 1, 2, 2)
    ]:  # fmt: skip
        ranks = folder / str(name)
        ranks.mkdir()
        run_ranks(ep_worker.report, ranks, ranks / "report.json", ep, zero, accumulation, world=world)
        found[name] = json.loads((ranks / "report.json").read_text())
    return found


@pytest.mark.parametrize("world", [2, 4, ACCUMULATED])
def test_losses_equal_one_process_on_every_step(reports, world):
    one, many = reports[1], reports[world]
    assert len(one["losses"]) == 20
    for step, (want, got) in enumerate(zip(one["losses"], many["losses"], strict=True), 1):
        assert abs(got - want) <= 1e-5 * abs(want), f"step {step}: {got} against {want}"
    assert many["norm"] == pytest.approx(one["norm"], rel=1e-4)
    assert one["losses"][-1] < one["losses"][0] - 0.01, "nothing was learned: the comparison would be empty"


@pytest.mark.parametrize("world", [1, 2, 4, ACCUMULATED])
def test_the_norm_and_the_clipping_are_deepspeeds(reports, world):
    theirs, ours = reports[world]["norms"]
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert reports[world]["clipped"], "the replay, which DeepSpeed clips itself, compares nothing"


@pytest.mark.parametrize("world", [1, 2, 4, ACCUMULATED])
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


@pytest.mark.parametrize("world", [1, 2, 4])
def test_partial_checkpoints_load_the_ranks_equally_where_deepspeed_puts_the_experts(reports, world):
    """The placement that the selection is balanced for is the one that ZeRO really makes."""
    sizes = {unit: size for unit, size in reports[1]["local_units"].items() if expert_of(unit)}
    tensors = {unit.split(".")[2]: size for unit, size in sizes.items()}
    layers = tuple(sorted({expert_of(unit).layer for unit in sizes}))
    count = 1 + max(expert_of(unit).expert for unit in sizes)
    ep = min(world, 2)
    experts = Experts(layers, count, ep, replicas=world // ep)
    placed = {
        rank: [r for r in map(Range.parse, texts) if expert_of(r.unit) and r.kind == "master"]
        for rank, texts in enumerate(reports[world]["ranges"])
    }
    predicted = zero_placement(experts, tensors)
    assert {rank: sorted(ranges) for rank, ranges in placed.items()} == {
        rank: sorted(ranges) for rank, ranges in predicted.items()
    }
    for checkpoint in range(count):
        assert imbalance(bytes_per_rank(select(experts, checkpoint, 2), placed).values()) <= 1.05


@pytest.mark.parametrize("name", [1, 2, 4, ACCUMULATED])
def test_ranks_learn_the_mean_loss_and_the_oldest_sealed_step(reports, name):
    world = 1 if name == ACCUMULATED else name
    assert reports[name]["exchange"] == [(world - 1) / 2, 10 - (world - 1)]


@pytest.mark.parametrize("name", [1, 2, 4, ACCUMULATED])
def test_deepspeed_counts_participants_our_way(reports, name):
    asked, parameters = reports[name]["asked"]
    assert asked == parameters > 0
