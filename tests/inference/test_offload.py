"""Whole models behind a simulated link."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from inference.calibrate import ExpertKind
from inference.engine import LLM
from inference.errors import InferenceError
from inference.offload import Crossing
from inference.opening import place_in
from inference.packing import why_not_packed
from inference.placement import RING_BYTES, place
from inference.predictors import PREDICTORS
from inference.runtime import Runtime
from inference.transfer import SimulatedLink
from tests.inference.test_engine import FAMILIES, tiny
from tests.inference.test_hybrid import EVEN


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_logits_of_every_family_have_the_same_bits_behind_a_link_at_every_budget(family, tmp_path):
    tiny(family, **FAMILIES[family]).save_pretrained(tmp_path)
    prompt = torch.randint(1, 96, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    resident = LLM(tmp_path, device="cpu")
    expected = [resident.logits(prompt), resident.logits(prompt[:3])]
    for budget in (0.0, 0.1, 0.25, 1.0):
        crossing = Crossing(prefetch="next_gate", lead=2, link=SimulatedLink(rate=1e8))
        llm = LLM(tmp_path, budget, device="cpu", poison=True, crossing=crossing)
        llm.executor.many_pairs = 32  # the long prompt streams, the short one goes through the slots
        for _ in range(2):
            assert torch.equal(llm.logits(prompt), expected[0]), budget
            assert torch.equal(llm.logits(prompt[:3]), expected[1]), budget
        moved = llm.executor.transfers.counts
        assert moved.demanded_bytes > 0


@pytest.mark.parametrize("prefetch", [name for name in PREDICTORS if name != "heads"])
def test_texts_are_the_same_whatever_is_prefetched(model_folder, prompts, prefetch):
    plain = [g.token_ids for g in LLM(model_folder, 0.25, device="cpu").generate(prompts[:3], 12)]
    llm = LLM(model_folder, 0.25, device="cpu", poison=True, crossing=Crossing(prefetch, link=SimulatedLink(rate=5e7)))
    assert [g.token_ids for g in llm.generate(prompts[:3], 12)] == plain
    counts = llm.cache.counts
    assert (counts.useful + counts.wasted > 0) == (prefetch != "none")
    stats = llm.stats()
    assert stats.hits + stats.misses > 12 * 4 * 4


@pytest.mark.parametrize("prefetch", ["none", "next_gate"])
def test_packed_experts_leave_every_bit_and_take_fewer_bytes(model_folder, prompts, prefetch):
    resident = LLM(model_folder, device="cpu", dtype=torch.bfloat16)
    expected = [resident.logits(prompt) for prompt in prompts[:3]]
    crossed = {}
    for pack in (True, False):
        crossing = Crossing(prefetch, pack=pack, link=SimulatedLink(rate=1e8))
        llm = LLM(model_folder, 0.25, device="cpu", dtype=torch.bfloat16, poison=True, crossing=crossing)
        source = llm.executor.transfers.source
        source.join()
        assert source.packs == pack
        for prompt, logits in zip(prompts[:3], expected, strict=True):
            assert torch.equal(llm.logits(prompt), logits)
        crossed[pack] = llm.stats().bytes_fetched
        floor = llm.report(EVEN).floor
        assert floor.link_s == pytest.approx(crossed[pack] / EVEN.link.alone)
        llm.close()
    assert 0.74 < crossed[True] / crossed[False] < 0.8


def test_the_cpu_computes_packed_experts_with_the_same_bits(model_folder, prompts):
    """The plans are the same: all costs of the made-up machine are in proportion to the bytes."""
    found, computed = [], []
    for pack in (True, False):
        crossing = Crossing(cpu=True, profile=EVEN, pack=pack, link=SimulatedLink(rate=5e7))
        with LLM(model_folder, 0.1, device="cpu", dtype=torch.bfloat16, poison=True, crossing=crossing) as llm:
            llm.executor.transfers.source.join()
            found.append([llm.logits(prompt) for prompt in prompts[:2]])
            found[-1] += [torch.tensor(one.token_ids) for one in llm.generate(prompts[:2], 6)]
            computed.append(llm.stats().cpu_experts)
    assert computed[0] == computed[1] > 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_only_what_can_be_packed_is(model_folder, monkeypatch):
    def packs(dtype, **given):
        crossing = Crossing(link=SimulatedLink(), **given)
        return LLM(model_folder, 0.25, device="cpu", dtype=dtype, crossing=crossing).executor.transfers.source.packs

    assert packs(torch.bfloat16)
    assert not packs(torch.float32)
    assert not packs(torch.bfloat16, pin=False), "without banks there is nothing to pack"
    monkeypatch.setattr("inference.packing.opened", lambda: "no C compiler")
    assert not packs(torch.bfloat16), "without a compiler packing would take minutes"
    with pytest.raises(InferenceError, match=r"pack=False \(--no-pack\) has nothing to save on cpu"):
        LLM(model_folder, 0.5, device="cpu", crossing=Crossing(pack=False))


NO_COMPILER = "no C compiler (cc, gcc or clang) on the PATH"


@pytest.mark.parametrize(
    ("settings", "dtype", "compiled", "said"),
    [
        ({}, torch.bfloat16, None, "experts are packed in page-locked memory, 12 bits for a weight\n"),
        ({"no_pack": True}, torch.bfloat16, None, "not packed in page-locked memory: pack=False (--no-pack)\n"),
        ({}, torch.float32, None, "not packed in page-locked memory: they are in float32, and only bfloat16 is\n"),
        ({}, torch.bfloat16, NO_COMPILER, f"not packed in page-locked memory: {NO_COMPILER}\n"),
        ({"no_pin": True}, torch.bfloat16, None, ""),
        ({"expert_budget": 1.0}, torch.bfloat16, None, ""),
    ],
)
def test_it_is_said_whether_experts_are_packed_and_if_not_why(
    model_folder, monkeypatch, capsys, settings, dtype, compiled, said
):
    monkeypatch.setattr("inference.offload.Crossing", partial(Crossing, link=SimulatedLink()))
    if compiled is not None:
        monkeypatch.setattr("inference.packing.opened", lambda: compiled)
    Runtime(**{"expert_budget": 0.25} | settings).open(str(model_folder), device="cpu", dtype=dtype).close()
    found = capsys.readouterr().err
    assert found.endswith(said) if said else "packed" not in found


def test_what_keeps_experts_from_being_packed(monkeypatch):
    gpu, kind = torch.device("cuda", 0), ExpertKind(64, 32, torch.bfloat16)
    monkeypatch.setattr("inference.packing.runs_triton", lambda device: device.type == "cuda")
    assert why_not_packed(kind.layout, gpu) is None
    assert "rows, of 64 and 40 weights, are not whole groups of 32" in why_not_packed(
        replace(kind, intermediate=40).layout, gpu
    )
    monkeypatch.setattr("inference.packing.runs_triton", lambda _: False)
    assert why_not_packed(kind.layout, gpu) == "there is no Triton to unpack them on cuda:0"
    assert why_not_packed(kind.layout, torch.device("cpu")) is None
    slow = SimpleNamespace(packed_is_quick=lambda: 0)
    monkeypatch.setattr("inference.packing.opened", lambda: slow)
    assert "neither AVX2 nor AVX-512" in why_not_packed(kind.layout, torch.device("cpu"))


def test_room_for_packed_experts_is_kept_where_they_are_packed_only(model_folder, monkeypatch):
    monkeypatch.setattr("inference.packing.runs_triton", lambda _: True)

    def ring(device="cuda", pack=True, dtype=torch.bfloat16):
        return place_in(model_folder, "1GiB", 64, torch.device(device), dtype, pack).ring

    monkeypatch.setattr("inference.opening.place", partial(placed_with_one_slot, place))
    assert ring() == RING_BYTES
    assert ring(pack=False) == ring(dtype=torch.float32) == ring("cpu") == 0
    monkeypatch.setattr("inference.packing.opened", lambda: NO_COMPILER)
    assert ring() == 0
    asked = []
    monkeypatch.setattr("inference.engine.place_in", lambda *given: asked.append(given[-1]) or place_in(*given))
    for pin, pack in ((True, True), (True, False), (False, True)):
        crossing = Crossing(pin=pin, pack=pack, link=SimulatedLink())
        LLM(model_folder, vram="1GiB", device="cpu", crossing=crossing).close()
    assert asked == [True, False, False], "without page-locked memory nothing is packed"


def placed_with_one_slot(place, sizes, *, vram, **given):
    """As if so little memory were given that one expert has a slot, whatever is kept free beside it."""
    return place(sizes, expert_budget=1e-9, **given)


def test_settings_that_mean_nothing_are_refused(model_folder):
    with pytest.raises(InferenceError, match="no predictor is called 'psychic'; there are none, same_as_last"):
        Crossing("psychic")
    with pytest.raises(InferenceError, match="at least 1"):
        Crossing("next_gate", lead=0)
    with pytest.raises(InferenceError, match="has no lookahead heads"):
        LLM(model_folder, 0.5, device="cpu", crossing=Crossing("heads", link=SimulatedLink()))
    with pytest.raises(InferenceError, match=r"prefetch=next_gate \(--prefetch\) has nothing to save on cpu"):
        LLM(model_folder, 0.5, device="cpu", crossing=Crossing("next_gate"))
    with pytest.raises(InferenceError, match=r"cpu=True \(--cpu-experts\) has nothing to save on cpu"):
        LLM(model_folder, 0.5, device="cpu", crossing=Crossing(cpu=True))


def test_the_cpu_lane_leaves_texts_as_they_are_and_spares_the_link(model_folder, prompts):
    plain = LLM(model_folder, 0.1, device="cpu")
    crossing = Crossing(cpu=True, profile=EVEN, link=SimulatedLink(rate=5e7))
    llm = LLM(model_folder, 0.1, device="cpu", poison=True, crossing=crossing)
    torch.testing.assert_close(llm.logits(prompts[4]), plain.logits(prompts[4]), rtol=1e-4, atol=1e-4)
    alone = plain.generate(prompts[:2], 16)
    assert [g.token_ids for g in llm.generate(prompts[:2], 16)] == [g.token_ids for g in alone]
    assert llm.cache.counts.computed > 50
    stats = llm.stats()
    assert stats.hit_rate == llm.report(EVEN).measured.hit_rate < stats.hits / (stats.hits + stats.misses)
    assert f" misses, {stats.cpu_experts} computed by the CPU (" in str(stats)
    assert llm.executor.transfers.counts.demanded_bytes < plain.cache.counts.bytes_fetched
