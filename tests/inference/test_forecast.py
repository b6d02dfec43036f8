"""How fast a model would run, and what the command says of it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from inference.costmodel import named_profile
from inference.forecast import (
    DECODE,
    PREFILL,
    assumed_forecast,
    assumed_use,
    check_room,
    forecast,
    lane_costs,
    placement_table,
    traced_use,
)
from inference.limits import MAX_ROWS
from inference.placement import PlacementError, place
from inference.simulate import Routing
from moe.tracefile import TraceHeader, TraceRecord, TraceWriter, trace_file
from trainer.cli import main

NO_GPU = dataclasses.replace(
    named_profile("h200"), link=None, gpu=(), gpu_memory=0.0, gpu_flops=0.0, gpu_room=0, fill=5e9
)


def test_the_h200_splits_if_told_and_streams_prompts_otherwise(sizes):
    placed = place(sizes, kv_tokens=4096, gpu=True, vram=16 << 30)
    by_default = {(one.phase, one.tokens): one for one in forecast(named_profile("h200"), placed)}
    assert [one.plan.mode for one in by_default.values()] == ["fetch", "fetch", "stream", "stream"]
    assert by_default[PREFILL, 4096].plan.bound == "link"
    told = forecast(named_profile("h200"), placed, cpu_experts=True)
    found = {(one.phase, one.tokens): one for one in told}
    one = found[DECODE, 1]
    assert one.plan.mode == "split"
    assert set(one.plan.alternatives) == {"fetch", "cpu", "split"}
    assert one.tokens_per_second > by_default[DECODE, 1].tokens_per_second
    assert found[PREFILL, 1024].plan.mode == "split"
    assert found[PREFILL, 1024].tokens_per_second > by_default[PREFILL, 1024].tokens_per_second
    assert set(found[PREFILL, 4096].plan.alternatives) == {"stream", "cpu", "split"}
    # By hand: misses of a layer over both lanes' rates, a floor that no plan may pass.
    missed = 48 * 8 * (1 - placed.share) * placed.sizes.expert_bytes
    assert one.plan.seconds > missed / (55.3e9 + 35.5e9)
    assert found[DECODE, 16].tokens_per_second > one.tokens_per_second


def test_a_prompt_streams_all_layers_for_each_chunk(sizes):
    placed = place(sizes, kv_tokens=4096, gpu=True, expert_budget=0.0)
    profile = named_profile("h200")
    once = assumed_forecast(lane_costs(profile, sizes, False), placed, PREFILL, MAX_ROWS).plan
    for chunks in (2, 8):
        plan = assumed_forecast(lane_costs(profile, sizes, False), placed, PREFILL, chunks * MAX_ROWS).plan
        assert plan.seconds == pytest.approx(chunks * once.seconds)
        assert plan.alternatives[plan.mode] == plan.seconds


def test_without_graphs_launches_are_paid_for(sizes):
    """All resident and one token: what is issued one by one takes longer than reading the weights."""
    placed = place(sizes, kv_tokens=4096, gpu=True, expert_budget=1.0)
    slow = dataclasses.replace(named_profile("h200"), launch_s=9e-6)
    plain, captured = forecast(slow, placed), forecast(slow, placed, graphs=True)
    assert plain[0].plan.seconds > 48 * 40 * 9e-6 > captured[0].plan.seconds
    assert plain[2:] == captured[2:], "prompts are not captured"


def test_more_memory_is_never_slower(sizes):
    profile = named_profile("h200")
    before = [0.0] * 4
    for budget in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0):
        placed = place(sizes, kv_tokens=4096, gpu=True, expert_budget=budget)
        rates = [one.tokens_per_second for one in forecast(profile, placed)]
        assert all(rate * (1 + 1e-9) >= low for rate, low in zip(rates, before, strict=True)), budget
        before = rates
    assert forecast(profile, placed)[0].plan.mode == "resident"


def test_without_a_gpu_the_cores_compute_everything(sizes):
    profile = NO_GPU
    placed = place(sizes, kv_tokens=4096, gpu=False, expert_budget=0.25)
    for one in forecast(profile, placed):
        assert one.plan.mode == "cpu"
    # A token reads its experts and the dense part: no faster than memory.
    token = 48 * 8 * placed.sizes.expert_bytes + placed.sizes.dense_bytes - placed.sizes.table_bytes
    assert forecast(profile, placed)[0].plan.seconds > token / 91e9
    packed = dataclasses.replace(placed, sizes=sizes.kept(pack=True))
    assert forecast(profile, packed) == forecast(profile, placed), "files are not packed"


def test_without_a_gpu_what_is_not_resident_is_read_into_its_slot(sizes):
    """As the runtime does: the budget is a share of the host's memory, and each miss a copy of an expert."""
    found = {}
    for budget in (0.0, 0.25, 1.0):
        placed = place(sizes, kv_tokens=4096, gpu=False, expert_budget=budget)
        found[budget] = forecast(NO_GPU, placed)[0].plan
        table = placement_table(placed, NO_GPU)
        assert any(f"{placed.slots} of 6144" in line and "host memory" in line for line in table)
        assert "files" in table[-1]
    token = 48 * 8 * sizes.expert_bytes / 5e9
    assert found[0.0].seconds - found[1.0].seconds == pytest.approx(token)
    assert found[0.25].seconds - found[1.0].seconds == pytest.approx(0.75 * token)
    assert found[0.0].bound == "reads"


@pytest.mark.parametrize("gpu", [True, False])
def test_more_than_the_machine_has_is_refused_with_the_most_that_fits(sizes, gpu):
    home = {"gpu_room": 20 << 30} if gpu else {"host_room": 20 << 30}
    profile = dataclasses.replace(named_profile("h200") if gpu else NO_GPU, **home)
    with pytest.raises(PlacementError, match=r"it takes 6\d.* has 21.5 GB: .* --expert-budget 0\.\d+$") as refused:
        check_room(place(sizes, kv_tokens=4096, gpu=gpu), profile)
    share = float(str(refused.value).split()[-1])
    check_room(place(sizes, kv_tokens=4096, gpu=gpu, expert_budget=share), profile)
    with pytest.raises(PlacementError):
        check_room(place(sizes, kv_tokens=4096, gpu=gpu, expert_budget=share + 0.001), profile)


def test_banks_that_the_host_has_no_room_for_are_refused(sizes):
    profile = dataclasses.replace(named_profile("h200"), host_room=32 << 30)
    with pytest.raises(PlacementError, match=r"h200 has 34\.4 GB: serve with --no-pin"):
        check_room(place(sizes, gpu=True, expert_budget=0.25), profile)
    check_room(place(sizes, gpu=True), profile)


def test_with_all_experts_in_slots_none_is_kept_in_host_memory(sizes):
    """As in the runtime, which makes no banks then."""
    tables = [placement_table(place(sizes, gpu=True, expert_budget=b), named_profile("h200")) for b in (0.5, 1.0)]
    assert ["host memory" in "".join(table) for table in tables] == [True, False]


def test_hits_of_a_trace_are_those_of_its_replay(sizes):
    """Two experts that every token wants hit always; with them alone in the trace all is resident."""
    sizes = dataclasses.replace(sizes, moe_layers=2, experts=8, top_k=2)
    index_TLK = np.tile(np.array([1, 6]), (64, 2, 1))
    habit = traced_use(sizes, Routing(index_TLK, 8), slots=4, batch=1)
    assert (habit.distinct, habit.hits) == (2.0, 1.0)
    assert traced_use(sizes, Routing(index_TLK, 8), slots=4, batch=4).distinct == 2.0
    halves = np.concatenate([index_TLK[:32], np.tile(np.array([2, 3]), (32, 2, 1))])
    side_by_side = traced_use(sizes, Routing(halves, 8), slots=4, batch=2)
    assert side_by_side.distinct == 4.0, "the two halves of the text decode side by side"
    with pytest.raises(PlacementError, match="2 layers with 9"):
        traced_use(sizes, Routing(index_TLK, 9), slots=4, batch=1)
    with pytest.raises(PlacementError, match=r"the trace has \d+ of the 128 tokens"):
        traced_use(sizes, Routing(index_TLK, 8), slots=4, batch=16)


def test_even_routing_is_the_assumption_without_a_trace(sizes):
    use = assumed_use(sizes, 0.25, 16)
    assert use.distinct == pytest.approx(128 * (1 - (120 / 128) ** 16))
    assert use.hits == 0.25
    assert "assumed" in use.source


def test_the_command_prints_what_where_how_fast_and_why(large, tmp_path, capsys):
    told = ["plan-inference", str(large), "--vram", "8GiB", "--kv-tokens", "4096", "--profile", "h200"]
    assert main([*told, "--no-pack"]) == 0
    plain = capsys.readouterr().out
    assert "packed" not in plain
    assert main(told) == 0
    assert "cpu ms" not in capsys.readouterr().out
    assert main([*told, "--cpu-experts"]) == 0
    text = capsys.readouterr().out
    for part in ("dense part", "all 6144 experts, packed",
                 "keys and values, 4096 tokens", "of 6144 experts", "host memory", "decode, batch 1 ",
                 "decode, batch 16", "prefill of 1024", "prefill of 4096", "bound by", "assumed: even routing",
                 "not measured", "fetch ms", "cpu ms", "split ms"):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize("compiler", [True, False])
def test_the_command_predicts_packed_experts_where_this_machine_packs_them(large, monkeypatch, capsys, compiler):
    """A machine with a GPU, whose profile is there already."""
    asked = []

    def profile(kind, device, recalibrate):
        asked.append(kind.packed)
        return dataclasses.replace(named_profile("h200"), packed=kind.packed)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("inference.calibrate.machine_profile", profile)
    monkeypatch.setattr("inference.packing.runs_triton", lambda _: True)
    routines = SimpleNamespace(packed_is_quick=lambda: True) if compiler else "no C compiler"
    monkeypatch.setattr("inference.packing.opened", lambda: routines)
    told = ["plan-inference", str(large), "--vram", "8GiB"]
    assert main(told) == 0
    assert ("all 6144 experts, packed" in capsys.readouterr().out) == compiler
    assert main([*told, "--no-pack"]) == 0
    assert "packed" not in capsys.readouterr().out
    assert asked == [compiler, False]


def test_the_command_takes_hits_from_a_trace(model_folder, tmp_path, capsys):
    header = TraceHeader("qwen3_moe", (0, 1, 2, 3), 16, 4)
    writer = TraceWriter(trace_file(tmp_path / "trace", 0), header)
    for layer in range(4):
        writer.write(TraceRecord(0, 0, layer, np.tile(np.arange(4), (256, 1))))
    writer.close()
    options = ["--profile", "h200", "--expert-budget", "0.25", "--trace", str(tmp_path)]
    assert main(["plan-inference", str(model_folder), *options]) == 0
    text = capsys.readouterr().out
    assert "experts and hits of decode: replayed: 256 rounds" in text
    assert "experts and hits of prefill: assumed" in text
    assert main(["plan-inference", str(model_folder), *options[:-1], str(tmp_path / "none")]) == 2


def test_the_command_refuses_in_a_sentence(large, capsys):
    assert main(["plan-inference", str(large), "--vram", "2GiB", "--profile", "h200"]) == 2
    assert "give at least" in capsys.readouterr().err
    assert main(["plan-inference", str(large), "--profile", "h2000"]) == 2
    assert "choose from h200" in capsys.readouterr().err
    assert main(["plan-inference", str(large), "--profile", "h200", "--recalibrate"]) == 2
    with pytest.raises(SystemExit):
        main(["plan-inference", str(large), "--vram", "2GiB", "--expert-budget", "0.5"])
