"""Mode pec over a run: what is captured and persisted when, what recoveries cost, and when the run turns exact."""

from __future__ import annotations

import pytest
import torch

from checkpointing.partial import Ages, Experts, select
from checkpointing.plt import Limits
from moe.refs import ExpertRef
from moe.stats import RoutingMeter
from trainer.partial_experts import PartialExperts
from trainer.schema import CheckpointSection, DiskSection, MemorySection, PecSection

EXPERTS = Experts((0, 1), 4, ep=2)
COPIES = 8  # routed per step and layer


def partial(steps: int = 100, max_plt: float = 0.5, every: int = 1, disk: int = 0, **pec) -> PartialExperts:
    section = CheckpointSection(
        mode="pec",
        memory=MemorySection(every=every),
        disk=DiskSection(every=disk),
        pec=PecSection(max_plt=max_plt, **pec),
    )
    limits = Limits(COPIES * steps, steps, max_plt, section.pec.dynamic_k, section.pec.fallback)
    return PartialExperts(EXPERTS, limits, section, RoutingMeter(drained=True), lambda counts: counts, first_k=1)


def route(run: PartialExperts, *experts: int) -> None:
    for layer in EXPERTS.layers:
        run.routing.add(layer, torch.tensor([experts or tuple(i % 4 for i in range(COPIES))]), EXPERTS.count)


def test_counts_are_those_of_the_whole_run_however_often_they_are_read():
    run = partial()
    for step in range(1, 6):
        route(run)
        run.routing.take()
        run.capture(step)
    assert run.meter.counts == ((10,) * 4,) * 2


def test_experts_have_their_turn_by_the_number_of_the_capture():
    run = partial(every=3)
    assert [run.is_due(step) for step in (1, 3, 4, 6)] == [False, True, False, True]
    route(run)
    assert run.capture(6) == select(EXPERTS, 2, 1)


def test_the_busiest_experts_are_captured_first_if_the_recipe_says_so():
    run = partial(selection="load_aware")
    route(run, 3, 3, 1)
    assert run.capture(1) == (ExpertRef(0, 3), ExpertRef(1, 3))
    route(run, 2)
    assert run.capture(2) == (ExpertRef(0, 1), ExpertRef(1, 1))


def test_the_first_checkpoint_on_disk_holds_all_experts_later_ones_some():
    run = partial(disk=4)
    assert set(run.persist(4)) == set(EXPERTS.all())
    assert run.persist(8) == select(EXPERTS, 2, 1)


def test_a_recovery_counts_the_tokens_of_old_experts_and_no_others():
    run, ages = partial(), Ages.unsaved(EXPERTS).saved(0, EXPERTS.all())
    for step in range(1, 8):
        route(run)
        ages = ages.saved(step, run.capture(step))
    again = partial()
    again.recovered(7, run.extras(), ages.steps)
    # Two copies a step and expert.
    assert again.meter.lost == tuple(
        sum(2 * (7 - step) for ref, step in ages.steps.items() if ref.layer == layer) for layer in EXPERTS.layers
    )
    assert again.meter.faults == 1
    once_more = partial()
    once_more.recovered(7, again.extras(), ages.steps)
    assert once_more.meter.lost == again.meter.lost


def test_reaching_max_plt_turns_the_run_exact_for_good():
    run = partial(steps=20, max_plt=0.2, dynamic_k=False)
    assert run.decide().mode is None
    for step in range(1, 9):
        route(run)
        run.capture(step)
    run.recovered(8, run.extras(), dict.fromkeys(EXPERTS.all(), 0))
    assert run.meter.plt(run.limits) == pytest.approx(8 / 20)
    assert run.decide().mode == "wal"
    assert run.exact == "wal"
    later = partial(steps=20, max_plt=0.9)
    later.recovered(8, run.extras(), {})
    assert later.decide().mode == "wal"
    assert later.exact == "wal"


@pytest.mark.parametrize("kind", ["padded", "dropped", "padded and dropped", "from another mode"])
def test_max_plt_is_of_the_copies_that_were_routed_and_not_of_padding_or_drops(kind):
    """Three of every four copies reach no expert: eight steps of a run of 20 are 40 % of it all the same."""
    run = partial(steps=20, max_plt=0.39, dynamic_k=False)
    begun = 4 if kind == "from another mode" else 0
    run.recovered(begun, {}, dict.fromkeys(EXPERTS.all(), begun))
    real = torch.arange(COPIES) < (COPIES // 4 if kind == "padded" else COPIES // 2)
    index = torch.arange(COPIES)[:, None] % 4
    if kind != "padded":
        index = index.masked_fill(torch.arange(COPIES)[:, None] % 2 == 1, EXPERTS.count)
    for step in range(begun + 1, begun + 9):
        for layer in EXPERTS.layers:
            run.routing.add(layer, index, EXPERTS.count, None if kind == "dropped" else real)
        run.capture(step)
    blobs = run.extras()
    later = partial(steps=20, max_plt=0.39, dynamic_k=False)
    later.recovered(begun + 8, blobs, dict.fromkeys(EXPERTS.all(), begun))
    assert later.figures()["plt"] == pytest.approx(8 / 20)
    assert later.decide().mode == "wal"


def test_k_grows_with_what_is_lost_and_is_remembered():
    run = partial(steps=100, max_plt=0.2)
    for step in range(1, 14):
        route(run)
        run.capture(step)
    run.recovered(13, run.extras(), dict.fromkeys(EXPERTS.all(), 0))
    assert run.decide().k == 2
    assert len(run.capture(14)) == 4
    later = partial(steps=100, max_plt=0.2)
    later.recovered(14, run.extras(), {})
    assert later.meter.k == 2


def test_the_last_step_is_completed():
    run = partial(steps=3)
    for step in range(1, 4):
        route(run)
        chosen = run.capture(step)
    left = run.left_out(3)
    assert set(left) | set(chosen) == set(EXPERTS.all())
    run.capture_rest(3)
    assert run.left_out(3) == []
