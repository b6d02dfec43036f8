"""Floors, drawn routing and ratios of the inference benchmark. The arms themselves need a GPU or patience."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from benchmarks.inference_freetoken import FreeToken, FreeTokenError
from benchmarks.inference_report import ALL, summarise


@dataclass(frozen=True)
class FlatRates:
    """A second for every missed expert."""

    def floor(self, shape, resident, fetched, computed):
        return {"s": fetched + computed, "bound": "host"}


@dataclass(frozen=True)
class Sizes:
    layers: int = 2
    choices: int = 4


class Broken:
    """An arm that takes two tokens at most and fails."""

    most, warmed, closed = 2, 0, False

    def warm(self, tokens):
        self.warmed = tokens
        raise RuntimeError("out of memory")

    def close(self):
        self.closed = True


def _row(seconds: list[float], **counted: float) -> dict:
    keys = ("resident", "fetched", "computed", "behind", "asked_s", "given_s", "books_s", "lane_s")
    figures = {"tokens": 2, **dict.fromkeys(keys, 0.0), **counted}
    return {"s": float(np.median(seconds)), "times_s": seconds, "figures": [figures] * len(seconds), "note": ""}


def test_ratios_are_the_right_way_up():
    rows = {
        ALL: _row([1.0]),
        "ours, 10% resident": _row([8.0], resident=4.0, fetched=8.0, computed=4.0),
        "ours, 10% resident, on demand, LRU": _row([20.0]),
        "transformers, all resident, batched_mm": _row([6.0, 4.0, 5.0]),
        "FreeToken 0.1.3, 10% resident, offload": _row([6.0]),
    }
    found = summarise(Sizes(), [FlatRates(), FlatRates()], rows)
    ours = found["arms"]["ours, 10% resident"]
    assert ours["hit_rate"] == pytest.approx(2 / 8)
    assert (ours["fetched"], ours["computed"]) == (4.0, 2.0)
    assert ours["share_of_floor"] == pytest.approx(6 / 8)
    assert found["arms"][ALL]["hit_rate"] == 1.0
    assert found["ratios"] == pytest.approx(
        {
            "ours, 10% resident / ours, 10% resident, on demand, LRU": 2.5,
            f"{ALL} / transformers, all resident, batched_mm": 5.0,
            f"{ALL} / transformers, all resident, batched_mm, its best round": 4.0,
            "ours, 10% resident / FreeToken 0.1.3, 10% resident, offload": 0.75,
            f"ours, 10% resident / {ALL}": 0.125,
        }
    )


def test_a_peer_that_cannot_start_leaves_no_process(tmp_path, monkeypatch):
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **more: started.append(popen(*given, **more)) or started[0])
    with pytest.raises(FreeTokenError, match="No module named 'freetoken'"):
        FreeToken("peer", str(tmp_path), tmp_path, np.zeros((1, 1, 1), dtype=np.int64), 1, "offload")
    assert started[0].returncode is not None
    assert started[0].stdout.closed


class TestWithTriton:
    """What imports the kernels."""

    pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

    def test_floor_is_what_binds(self):
        from benchmarks.inference_model import Shape
        from benchmarks.inference_rates import Rates

        shape = Shape(1, 10, 10, 8, 4, 1, 1, 10, 10, torch.bfloat16)
        assert shape.expert_bytes == 600
        rates = Rates(
            host_bytes=600, link=60.0, link_beside=40.0, lane=90.0, lane_beside=80.0, memory=1e9, lane_s=(8.0,) * 4
        )
        split = rates.floor(shape, 0, 1, 3)
        assert (split["bound"], split["s"]) == ("host", pytest.approx(4 * 600 / 120))
        fetched = rates.floor(shape, 0, 4, 0)
        assert (fetched["bound"], fetched["s"]) == ("link", pytest.approx(4 * 600 / 60))
        packed = replace(rates, host_bytes=450)
        assert packed.floor(shape, 0, 4, 0)["s"] == pytest.approx(4 * 450 / 60)
        written = packed.floor(shape, 0, 1, 0)["gpu_memory_s"] - rates.floor(shape, 0, 1, 0)["gpu_memory_s"]
        assert written * 1e9 == pytest.approx(2 * 450), "what arrives is written and read once more"

    def test_drawn_routing_has_the_locality_it_claims(self):
        from benchmarks.inference_model import Shape, draw_trace, locality

        shape = Shape(3, 8, 8, 128, 8, 1, 1, 8, 8, torch.float32)
        trace = draw_trace(shape, 600)
        assert all(len(set(row)) == 8 for row in trace.reshape(-1, 8).tolist())
        found = locality(trace, 128)
        assert 0.28 < found["shared_with_last"] < 0.34
        assert 0.58 < found["popular_half"] < 0.68
        assert (trace == draw_trace(shape, 600)).all()

    def test_forced_routing_follows_the_trace(self):
        from benchmarks.inference_model import ForcedRouting

        class Gate(torch.nn.Module):
            def forward(self, hidden_states):
                rows = hidden_states.shape[0]
                return torch.zeros(rows, 4), torch.tensor([[0.7, 0.3]]), torch.zeros(rows, 2, dtype=torch.int64)

        trace = np.arange(12).reshape(3, 2, 2)
        gates, routing = [Gate(), Gate()], ForcedRouting(trace, torch.device("cpu"))
        routing.attach(gates)
        routing.start(2)
        chosen = [[gate(torch.zeros(1, 3))[2].tolist() for gate in gates] for _ in range(2)]
        assert chosen == [[[[8, 9]], [[10, 11]]], [[[0, 1]], [[2, 3]]]], "behind the last token comes the first"
        assert gates[0](torch.zeros(2, 3))[2].tolist() == [[0, 0], [0, 0]], "prompts are routed as they are"

    def test_an_arm_that_fails_while_it_warms_up_is_closed(self):
        from benchmarks.inference_arms import warmed

        arm = Broken()
        with pytest.raises(RuntimeError, match="out of memory"):
            warmed(lambda: arm, 8)
        assert (arm.warmed, arm.closed) == (2, True)

    @pytest.mark.slow
    @pytest.mark.timeout(200)
    def test_the_script_runs_to_its_end(self, tmp_path):
        out = tmp_path / "result.json"
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path)}
        command = [sys.executable, "-m", "benchmarks.inference", "--config", "tiny", "--json", str(out)]
        done = subprocess.run(command, env=environment, timeout=190, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        result = json.loads(out.read_text())
        assert not result["skipped"]
        assert all(found["same_tokens"] for found in result["exact"].values())
        assert all(found["same_bits"] for name, found in result["exact"].items() if "link only" in name)
