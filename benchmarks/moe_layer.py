"""One MoE layer, forward and backward: ours beside transformers', ScatterMoE's and DeepSpeed's.

All arms take turns in each round, with the same weights and routing, so that a drift of the machine meets all alike.
Beside each time stand the share of a matrix product's speed measured in the same run, the bytes saved for backward,
the peak, and how far output and gradients are from transformers' eager layer.

``python -m benchmarks.moe_layer --config cpu|qwen3|mixtral``; on a CPU one thread, and its own time, not the wall's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.layer_arms import (
    Arm,
    Routed,
    Shape,
    Skipped,
    deepspeed_arm,
    our_arm,
    route,
    scattermoe_arm,
    transformers_arm,
    transformers_layer,
)
from benchmarks.layer_report import table
from benchmarks.machine import describe_machine, result_path, save, say, timed

CONFIGS = {
    "qwen3": [Shape(16384, 2048, 768, 128, 8)],
    "mixtral": [Shape(8192, 4096, 14336, 8, 2)],
    "cpu": [
        Shape(512, 256, 96, 16, 8),
        Shape(512, 256, 128, 8, 2),
        Shape(1024, 512, 192, 32, 8),
        Shape(2048, 256, 128, 64, 8),
        Shape(301, 250, 99, 12, 3),
        Shape(777, 130, 70, 48, 6),
    ],
    "tiny": [Shape(40, 16, 8, 4, 2)],
}
REFERENCE = "transformers eager"


class Bench:
    """One shape's arms on one device, and the figures so far."""

    def __init__(self, shape: Shape, device: torch.device, only: list[str]) -> None:
        self.shape, self.device, self.only = shape, device, only
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.skipped: dict[str, str] = {}
        model, experts = transformers_layer(shape, device, self.dtype)
        self.arms: list[Arm] = []
        for name in ("eager", "grouped_mm", "batched_mm"):
            self._add(f"transformers {name}", lambda name=name: transformers_arm(model, experts, name, shape))
        for name in ("grouped_mm", "minimal", "triton"):
            self._add(f"ours {name}", lambda name=name: our_arm(experts, name))
        self._add("ScatterMoE", lambda: scattermoe_arm(experts, shape))
        self._add("DeepSpeed MoE", lambda: deepspeed_arm(experts, shape))

    def _add(self, name: str, make: Callable[[], Arm]) -> None:
        if self.only and name != REFERENCE and not any(part in name for part in self.only):
            self.skipped[name] = "left out by --only"
            return
        try:
            self.arms.append(make())
        except Skipped as why:
            self.skipped[name] = str(why)
        except Exception as error:  # a peer may fail in any way; the others go on, and the reader is told
            self.skipped[name] = f"{type(error).__name__}: {error}"

    def measure(self, skewed: bool, rounds: int, until: float) -> dict[str, Any]:
        """Parity, bytes and then times under one routing; fewer rounds if the clock reaches ``until``."""
        routed = route(self.shape, skewed, self.device, self.dtype)
        upstream_TH = torch.randn(routed.x_TH.shape, device=self.device, dtype=self.dtype)
        rows: dict[str, Any] = {}
        reference: list[Tensor] = []
        for arm in self.arms:
            try:
                arm.prepare(routed)
                found = self._step(arm, routed, upstream_TH)  # the first call also compiles
                reference = reference or found
                errors = [_error(g, w) for g, w in zip(found, reference, strict=True)]
                del found
                rows[arm.name] = {
                    "error": dict(zip(("out", "dx", "dw"), errors, strict=True)),
                    **self._bytes(arm, routed, upstream_TH),
                    "exact": arm.exact,
                    "note": arm.note,
                    "times_s": [],
                }
            except Exception as error:  # as above
                self.skipped[f"{arm.name}{', skewed' * skewed}"] = f"{type(error).__name__}: {error}"
        del reference
        for _ in range(rounds):
            for arm in self.arms:
                if arm.name in rows:
                    arm.prepare(routed)
                    seconds = timed(lambda arm=arm: self._step(arm, routed, upstream_TH), self.device)
                    rows[arm.name]["times_s"].append(seconds)
            if time.monotonic() > until:
                break
        for row in rows.values():
            row["s"] = statistics.median(row["times_s"])
        return rows

    def _step(self, arm: Arm, routed: Routed, upstream_TH: Tensor) -> list[Tensor]:
        """Output, and gradients of x and of the scores; those of the parameters are made and dropped."""
        x, weights = routed.x_TH.detach().requires_grad_(), routed.weights_TK.detach().requires_grad_()
        for parameter in arm.parameters:
            parameter.grad = None
        out = arm.run(x, routed.index_TK, weights)
        out.backward(upstream_TH)
        assert x.grad is not None
        scores = weights.grad if weights.grad is not None else torch.zeros_like(weights)
        for parameter in arm.parameters:
            parameter.grad = None
        return [out.detach(), x.grad, scores]

    def _bytes(self, arm: Arm, routed: Routed, upstream_TH: Tensor) -> dict[str, int | None]:
        """Saved: distinct storages kept for backward, but for parameters and inputs; peak: beyond what was there."""
        x, weights = routed.x_TH.detach().requires_grad_(), routed.weights_TK.detach().requires_grad_()
        known = {t.untyped_storage().data_ptr() for t in (x, weights, routed.index_TK, *arm.parameters)}
        kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = arm.run(x, routed.index_TK, weights)
        del out
        peak = None
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self._step(arm, routed, upstream_TH)
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        return {"saved_bytes": sum(kept.values()), "peak_bytes": peak}

    def ceiling(self) -> float:
        """FLOP/s of one large product: 8192^3 in bf16, on a CPU 1024^3 in fp32 on one thread."""
        n = 8192 if self.device.type == "cuda" else 1024
        left, right = (torch.randn(n, n, device=self.device, dtype=self.dtype) for _ in range(2))
        timed(lambda: left @ right, self.device)
        return 2 * n**3 / statistics.median(timed(lambda: left @ right, self.device) for _ in range(9))


def _error(got: Tensor, want: Tensor) -> float:
    want = want.double()
    return float((got.double() - want).norm() / want.norm())


def run_shape(shape: Shape, device: torch.device, options: argparse.Namespace, until: float) -> dict[str, Any]:
    bench = Bench(shape, device, options.only)
    result: dict[str, Any] = {"shape": vars(shape), "ceiling_flops": bench.ceiling()}
    half = time.monotonic() + (until - time.monotonic()) / 2
    result["balanced"] = bench.measure(False, options.rounds, half)
    result["skewed"] = bench.measure(True, max(options.rounds // 2, 1), until)
    result["skipped"] = bench.skipped
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", nargs="+", choices=sorted(CONFIGS), required=True)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget-seconds", type=float, default=480, help="shared by all shapes, for their rounds")
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of arms to run beside the reference")
    parser.add_argument("--json", help="where to write the figures")
    options = parser.parse_args()
    path = result_path(f"moe_layer-{'-'.join(options.config)}.json", options.json)
    run_all(options, path)
    say(f"written to {path}")


def run_all(options: argparse.Namespace, path: Path) -> None:
    ends = time.monotonic() + options.budget_seconds
    shapes = [(name, shape) for name in options.config for shape in CONFIGS[name]]
    result: dict[str, Any] = {"machine": describe_machine(), "layers": {}}
    for place, (name, shape) in enumerate(shapes):
        on_gpu = name in ("qwen3", "mixtral")
        if on_gpu and not torch.cuda.is_available():
            say(f"left out: {name}: no CUDA device")
            continue
        if not on_gpu:
            torch.set_num_threads(1)
        until = time.monotonic() + (ends - time.monotonic()) / (len(shapes) - place)
        layer = run_shape(shape, torch.device("cuda" if on_gpu else "cpu"), options, until)
        result["layers"][f"{name}: {shape}"] = layer
        say(table(f"{name}: {shape}", layer, shape.flops))
        save(path, result)
        if on_gpu:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
