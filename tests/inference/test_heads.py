"""Lookahead heads in an exported folder, what they say of a call, and recording it while serving."""

from __future__ import annotations

import json
import resource
import shutil
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from inference.engine import LLM
from inference.errors import InferenceError
from inference.foresight import ForeseenReuse
from inference.heads import FOLDER, MANIFEST, WEIGHTS, Heads, any_of, load_heads, save_heads
from inference.offload import Crossing
from inference.recorded_heads import MAX_ROWS, SpilledRows, heads_file, read_heads
from inference.recording import RoutingRecorder
from inference.rows import Rows, Span, computing
from inference.shadow import Hedge, Shadow
from inference.simulate import FORESEEN, read_routing, replay
from inference.transfer import SimulatedLink
from moe.fingerprint import fingerprint
from moe.tracefile import Trace, TraceError, TraceHeader

LAYERS, EXPERTS, HIDDEN, RANK = 4, 16, 64, 8


def drawn_heads(seed=0):
    generator = torch.Generator().manual_seed(seed)
    outputs = 2 * LAYERS * EXPERTS
    shapes = ((LAYERS, HIDDEN, RANK), (LAYERS, RANK, outputs), (LAYERS, outputs))
    return Heads(*(torch.randn(shape, generator=generator) for shape in shapes), EXPERTS)


@pytest.fixture
def folder(model_folder, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(model_folder, copy)
    save_heads(drawn_heads(), copy, tuple(range(LAYERS)), {"tokens": 1})
    return copy


def test_what_is_saved_is_loaded_and_leaves_the_weights_fingerprint(model_folder, folder):
    heads, manifest = load_heads(folder)
    for mine, theirs in zip(vars(drawn_heads()).values(), vars(heads).values(), strict=True):
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
    assert (manifest.layers, manifest.rank, manifest.training) == ((0, 1, 2, 3), RANK, {"tokens": 1})
    assert fingerprint(folder) == fingerprint(model_folder) == manifest.base_fingerprint


def test_heads_of_other_weights_are_refused(folder):
    file = folder / "model.safetensors"
    blob = bytearray(file.read_bytes())
    blob[-1] ^= 1
    file.write_bytes(blob)
    with pytest.raises(InferenceError, match="trained for other weights"):
        load_heads(folder)
    with pytest.raises(InferenceError, match="trained for other weights"):
        LLM(folder, 0.25)


def test_damaged_heads_are_refused(folder):
    file = folder / FOLDER / WEIGHTS
    blob = bytearray(file.read_bytes())
    blob[-1] ^= 1
    file.write_bytes(blob)
    with pytest.raises(InferenceError, match="does not match its manifest's hash"):
        load_heads(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 9}, "format 9"),
        ({"rank": 5}, "disagree"),
        ({"horizons": [1, 2]}, "horizons"),
        ({"x": 1}, "manifest"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(folder, change, said):
    file = folder / FOLDER / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InferenceError, match=said):
        load_heads(folder)


def test_heads_without_their_manifest_are_refused(folder):
    (folder / FOLDER / MANIFEST).unlink()
    with pytest.raises(InferenceError, match=f"make heads with .*, or take {folder / FOLDER} away"):
        LLM(folder, 0.25)


def test_a_folder_without_heads_says_how_to_make_them(model_folder):
    with pytest.raises(InferenceError, match="planaria lookahead train"):
        load_heads(model_folder)


def test_one_row_is_two_products_and_a_bias():
    heads, x_1H = drawn_heads(), torch.randn(1, HIDDEN)
    z = x_1H[0] @ heads.inward_LHR[2] @ heads.outward_LRO[2] + heads.bias_LO[2]
    torch.testing.assert_close(heads.ahead(2, x_1H), z.view(2, LAYERS, EXPERTS))
    following = heads.next_calls(2, x_1H, 3)
    torch.testing.assert_close(following, z.view(2, LAYERS, EXPERTS)[0, [3, 0, 1]])


def test_rows_decoded_together_use_what_any_of_them_uses_and_a_prompt_is_its_last_row():
    heads, x_TH = drawn_heads(), 0.1 * torch.randn(MAX_ROWS + 1, HIDDEN)
    few = torch.stack([heads.ahead(1, x_TH[i : i + 1]) for i in range(3)])
    any_one = 1 - (1 - few.sigmoid()).prod(0)
    torch.testing.assert_close(heads.ahead(1, x_TH[:3]).sigmoid(), any_one)
    torch.testing.assert_close(heads.ahead(1, x_TH), heads.ahead(1, x_TH[-1:]))
    with computing(Rows.of([([1], Span((0,), 0, 1))] * len(x_TH))):  # as many sequences, decoded together
        together = heads.ahead(1, x_TH)
    parts = torch.stack([heads.ahead(1, part) for part in x_TH.split(11)]).sigmoid()
    torch.testing.assert_close(together.sigmoid(), 1 - (1 - parts).prod(0))
    assert any_of(torch.tensor([[-90.0, 90.0], [-90.0, 90.0]])).isfinite().all()


def test_an_export_with_heads_tells_its_default_policy_and_writes_the_same_text(folder, model_folder, prompts):
    told = []
    llm = LLM(folder, 0.25)
    assert isinstance(llm.cache.policy, Hedge)
    policy = llm.cache.policy.shadows["foreseen_reuse"].policy
    assert isinstance(policy, ForeseenReuse)
    before = policy.foresee
    policy.foresee = lambda ahead: (told.append(ahead), before(ahead))
    texts = [g.token_ids for g in llm.generate(prompts[:2], 4)]
    assert texts == [g.token_ids for g in LLM(model_folder, 1.0).generate(prompts[:2], 4)]
    assert len(told) >= 4 * LAYERS
    assert told[0].shape == (2, LAYERS, EXPERTS)


def test_a_recording_replays_to_the_misses_that_were_served(folder, prompts, tmp_path):
    trace = tmp_path / "served.trace"
    llm = LLM(folder, 0.3, policy=lambda layers, experts, _: ForeseenReuse(layers, experts), trace=trace)
    llm.generate([prompts[0]], 12)
    llm.generate([prompts[5]], 12)
    llm.close()
    routing = read_routing(trace)
    assert len(routing.starts) == 2
    assert len(list(routing.spans())) == 24
    assert len(routing.index_TLK) == len(prompts[0]) + len(prompts[5]) + 2 * 11
    slots = llm.cache.slots
    served, found = llm.stats(), replay(routing, FORESEEN, slots, warm_up=0)
    # Heads are recorded in half precision, which may turn a close choice around.
    assert found.hits + found.misses == served.hits + served.misses
    assert found.misses == pytest.approx(served.misses, rel=0.03)


def test_a_recording_without_heads_replays_exactly(model_folder, prompts, tmp_path):
    trace = tmp_path / "served.trace"
    llm = LLM(model_folder, 0.6, trace=trace)
    llm.generate(prompts[:2], 8)
    llm.close()
    assert read_heads(trace) is None
    routing = read_routing(trace)
    policy = Hedge(routing.layers, routing.experts, llm.cache.slots)
    shadow = Shadow(policy, llm.cache.slots)
    assert sum(shadow.use(row, experts_N) for _, row, experts_N in routing.calls()) == llm.stats().misses


def test_what_was_recorded_beside_another_trace_is_refused(folder, prompts, tmp_path):
    for name in ("a", "b"):
        llm = LLM(folder, 0.3, trace=tmp_path / name)
        llm.generate([prompts[0 if name == "a" else 3]], 3)
        llm.close()
    shutil.copy(heads_file(tmp_path / "a"), heads_file(tmp_path / "b"))
    with pytest.raises(TraceError, match="was not recorded with"):
        read_routing(tmp_path / "b")
    heads_file(tmp_path / "b").write_bytes(b"PK nonsense")
    with pytest.raises(TraceError, match="not what heads said"):
        read_routing(tmp_path / "b")


def test_recorded_heads_say_what_heads_said(folder, prompts, tmp_path):
    llm = LLM(folder, 1.0, trace=tmp_path / "t")
    llm.generate([prompts[0]], 3)
    llm.close()
    recorded = read_heads(tmp_path / "t")
    assert np.isnan(recorded.gate_TLE[:, -1].astype(float)).all()
    assert np.isfinite(recorded.gate_TLE[:, :-1].astype(float)).all()
    heads, _ = load_heads(folder)
    codes_TR = torch.from_numpy(recorded.codes_TLR[:3, 1].astype(np.float32))
    z_TO = codes_TR @ heads.outward_LRO[1] + heads.bias_LO[1]
    np.testing.assert_allclose(recorded.ahead(slice(0, 3), 1).reshape(-1), any_of(z_TO).numpy(), rtol=1e-3, atol=1e-3)


def test_after_a_pass_that_failed_halfway_heads_and_routing_are_of_the_same_tokens(tmp_path):
    """The first layers had noted the failed pass: their rows would be one pass behind for good."""
    heads, x_TH = drawn_heads(), torch.randn(3, HIDDEN)
    recorder = RoutingRecorder(tmp_path / "t", TraceHeader("qwen3_moe", tuple(range(LAYERS)), EXPERTS, 2), heads)
    for token, layers in ((0, LAYERS), (1, 2), (2, LAYERS)):
        for layer in range(layers):
            recorder.note(layer, x_TH[token : token + 1], torch.tensor([[token, 5]]))
    recorder.close()
    assert read_routing(tmp_path / "t").index_TLK[:, :, 0].tolist() == [[0] * LAYERS, [2] * LAYERS]
    codes_TLR = read_heads(tmp_path / "t").codes_TLR
    for layer in range(LAYERS):
        assert np.array_equal(codes_TLR[:, layer], heads.codes(layer, x_TH[[0, 2]]).half().numpy())


def test_what_heads_say_is_not_kept_in_memory_while_it_is_recorded(tmp_path):
    rows = SpilledRows(tmp_path, 2)
    wanted = np.random.default_rng(0).normal(size=(40_000, 2, 64)).astype(np.float16)
    tracemalloc.start()
    for start in range(0, len(wanted), 1000):
        for row in range(2):
            rows.add(row, wanted[start : start + 1000, row])
    rows.add(0, wanted[:1, 0])  # of a pass that was broken off
    assert tracemalloc.get_traced_memory()[0] < 1e6 < wanted.nbytes
    tracemalloc.stop()
    assert np.array_equal(rows.whole(), wanted)
    rows.close()
    assert not list(tmp_path.iterdir())


@contextmanager
def room_in_files(nbytes):
    """As on a disk that fills up: a file cannot grow beyond that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("with_heads", [False, True])
def test_a_full_disk_ends_the_recording_and_nothing_else(model_folder, folder, prompts, tmp_path, capsys, with_heads):
    used, trace = folder if with_heads else model_folder, tmp_path / "t"
    llm = LLM(used, 1.0, trace=trace)
    (expected,) = llm.generate([prompts[0]], 2)
    whole = len(Trace(trace).keys)
    with room_in_files(trace.stat().st_size + 50):  # less than a record
        (generation,) = llm.generate([prompts[0]], 4)
    assert generation.token_ids[:2] == expected.token_ids
    assert llm.recording_failed
    llm.generate([prompts[0]], 4)
    llm.close()
    assert capsys.readouterr().err.count("has stopped") == 1
    assert len(Trace(trace).keys) >= whole
    assert "cut short" not in capsys.readouterr().err, "half a record is left"
    assert not heads_file(trace).exists()


def test_what_heads_said_may_find_the_disk_full_in_the_end(folder, prompts, tmp_path, capsys):
    llm = LLM(folder, 1.0, trace=tmp_path / "t")
    llm.generate([prompts[0]], 4)
    with room_in_files(100):
        llm.close()
    assert "has stopped" in capsys.readouterr().err
    assert not heads_file(tmp_path / "t").exists()


def test_a_trace_that_is_there_is_not_written_over(model_folder, tmp_path):
    (tmp_path / "t").write_text("mine")
    with pytest.raises(InferenceError, match="exists; give the trace another name"):
        LLM(model_folder, 0.5, trace=tmp_path / "t")
    assert (tmp_path / "t").read_text() == "mine"


def test_prefetching_by_heads_over_a_link_writes_the_same_text(folder, model_folder, prompts):
    llm = LLM(folder, 0.5, crossing=Crossing("heads", lead=2, link=SimulatedLink()))
    texts = [g.token_ids for g in llm.generate(prompts[:2], 8)]
    assert texts == [g.token_ids for g in LLM(model_folder).generate(prompts[:2], 8)]
    assert llm.executor.prefetcher.predictor.wanted > 0  # heads did suggest
    assert llm.cache.policy.uses_heads


def test_over_a_link_the_policy_is_told_the_same_in_the_read_back(folder, prompts):
    said = []
    for crossing in (None, Crossing(link=SimulatedLink())):
        llm, told = LLM(folder, 0.5, crossing=crossing, policy=lambda *sizes: ForeseenReuse(*sizes[:2])), []
        before, note = llm.cache.policy.foresee, llm.cache.policy.use
        llm.cache.policy.foresee = lambda ahead, before=before, told=told: (told.append(ahead), before(ahead))
        llm.cache.policy.use = lambda *call, note=note, told=told: (told.append(call), note(*call))
        llm.generate(prompts[:2], 6)
        said.append(told)
        hooks = [len(m._forward_pre_hooks) for m in llm.model.modules() if type(m).__name__ == "OffloadedExperts"]
        assert hooks == [crossing is None] * LAYERS
    assert len(said[0]) == len(said[1]) == 2 * LAYERS * 6
    for one, other in zip(*said, strict=True):
        if isinstance(one, tuple):
            assert (one[0], list(one[1])) == (other[0], list(other[1]))
        else:
            assert np.array_equal(one, other)


def test_prefetching_by_heads_without_any_is_refused(model_folder):
    with pytest.raises(InferenceError, match="no lookahead heads"):
        LLM(model_folder, 0.5, crossing=Crossing("heads", link=SimulatedLink()))
