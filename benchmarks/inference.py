"""Decoding one sequence with a small share of the experts resident: ours beside accelerate, transformers, FreeToken.

All arms have the same weights and the same forced routing and take turns, so that a drift of the machine meets all
alike. The floor of an arm is reckoned from rates measured in the same run and from what the arm fetched and computed.

``python -m benchmarks.inference --config gpu|tiny [--freetoken WHEELS]``; ``tiny`` shows on a CPU that everything runs
(with TRITON_INTERPRET=1), its figures mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.inference_arms import Arm, Ours, Transformers, open_banks, warmed
from benchmarks.inference_freetoken import FreeToken
from benchmarks.inference_model import Shape, described, draw_trace, locality, write_model
from benchmarks.inference_rates import Rates, measure
from benchmarks.inference_report import ALL, RAW, summarise, tables
from benchmarks.machine import describe_machine, result_path, save, say
from inference.banks import ExpertBanks
from inference.calibrate import ExpertKind, calibrate
from inference.costmodel import PACKED_BYTES, ExpertCosts, describe
from inference.cpu_lane import CpuLane
from inference.expert_block import ExpertBlock
from inference.graphed import PlannedSplit
from inference.packed import packable
from inference.planner import CallPlanner
from inference.policies import LRU, LayeredLRU, Policy
from inference.shadow import SAMPLED, Hedge
from inference.skeleton import build_skeleton, expert_shape
from inference.store import ExpertStore, TensorFiles


@dataclass(frozen=True)
class Config:
    """``share``: of the experts that are resident; ``warm`` tokens precede the rounds of ``tokens`` each."""

    shape: Shape
    device: str
    share: float
    warm: int
    tokens: int
    rounds: int


CONFIGS = {
    "gpu": Config(Shape(12, 2048, 768, 128, 8, 32, 4, 128, 32768, torch.bfloat16), "cuda", 0.1, 96, 48, 5),
    "tiny": Config(Shape(2, 64, 32, 16, 2, 4, 2, 16, 320, torch.float32), "cpu", 0.25, 2, 2, 2),
}


@dataclass(frozen=True)
class Form:
    """Experts as they lie in host memory, packed or not, with the product's lane and plan for them."""

    banks: ExpertBanks
    lane: CpuLane
    plan: CallPlanner
    rates: Rates


class Bench:
    """The arms, made one after the other; one that cannot be made is left out, and the reader told why.

    ``stack`` closes them in the end.
    """

    def __init__(self, config: Config, folder: Path, only: list[str], stack: ExitStack) -> None:
        self._stack = stack
        self.config, self.folder, self.only = config, folder, only
        self.device = torch.device(config.device)
        self.arms: list[Arm] = []
        self.skipped: dict[str, str] = {}
        shape = config.shape
        self.trace_NLK = draw_trace(shape, config.warm + config.tokens * config.rounds + 64)
        self.forms = {packed: self._form(packed) for packed in (False, True)}
        self.banks = self.forms[False].banks
        self.slots = max(round(config.share * shape.total), 2 * shape.choices)

    def _form(self, packed: bool) -> Form:
        """With as many threads as the product's calibration found best, and the plan that follows from it.

        Packed only if it can be: the tiny model's experts are in fp32.
        """
        shape, (store, layout) = self.config.shape, _store(self.folder)
        packed = packed and packable(layout)
        profile = calibrate(ExpertKind(shape.hidden, shape.intermediate, shape.dtype, packed), self.device)
        began = time.monotonic()
        banks = self._stack.enter_context(closing(open_banks(store, layout, self.device, packed)))
        say(f"{'packed ' * packed}banks of {banks.nbytes:,} bytes filled in {time.monotonic() - began:.1f} s")
        itemsize = PACKED_BYTES if packed else shape.dtype.itemsize
        plan = CallPlanner(ExpertCosts.of(profile, shape.hidden, shape.intermediate, itemsize))
        sizes = (shape.hidden, shape.intermediate, shape.dtype, layout.parts[1].start)
        lane = self._stack.enter_context(closing(CpuLane(profile.threads, *sizes)))
        say(f"{profile.threads} threads and the caller's; {'; '.join(describe(profile))}")
        rates = measure(shape, banks, lane, store.layers, self.device)
        say(f"rates, {'packed' if packed else 'as they are'}: {rates}")
        return Form(banks, lane, plan, rates)

    def add(self, name: str, make: Callable[[str], Arm]) -> None:
        if self.only and not any(part in name for part in self.only):
            self.skipped[name] = "left out by --only"
            return
        began = time.monotonic()
        try:
            arm = warmed(partial(make, name), self.config.warm)
        except Exception as error:  # a peer may fail in any way; the others go on, and the reader is told
            self.skipped[name] = f"{type(error).__name__}: {error}"
            say(f"left out: {name}: {self.skipped[name]}")
            return
        self.arms.append(self._stack.enter_context(closing(arm)))
        say(f"{name}: ready after {time.monotonic() - began:.1f} s")

    def ours(
        self,
        slots: int,
        policy: Callable[[int, int, int], Policy],
        *,
        lane: bool,
        graphs: bool = True,
        packed: bool = True,
    ) -> Callable[[str], Arm]:
        form = self.forms[packed]
        return partial(
            Ours,
            folder=self.folder,
            trace_NLK=self.trace_NLK,
            banks=form.banks,
            device=self.device,
            slots=slots,
            policy=policy,
            lane=form.lane if lane else None,
            split=PlannedSplit(form.plan, self.config.shape.choices) if lane else None,
            graphs=graphs,
        )

    def theirs(self, experts: str, **more: Any) -> Callable[[str], Arm]:
        given = {"folder": self.folder, "trace_NLK": self.trace_NLK, "banks": self.banks, "device": self.device}
        return partial(Transformers, experts=experts, **given, **more)

    def run(self, until: float) -> dict[str, Any]:
        """Rounds in which every arm decodes; fewer if the clock reaches ``until``."""
        rows: dict[str, Any] = {arm.name: {"times_s": [], "note": arm.note, "figures": []} for arm in self.arms}
        for _ in range(self.config.rounds):
            for arm in self.arms:
                tokens = min(self.config.tokens, arm.most or self.config.tokens)
                rows[arm.name]["times_s"].append(arm.round(tokens) / tokens)
                rows[arm.name]["figures"].append({"tokens": tokens, **arm.figures()})
            if time.monotonic() > until:
                break
        for row in rows.values():
            row["s"] = statistics.median(row["times_s"])
        return rows


def _store(folder: Path) -> tuple[ExpertStore, ExpertBlock]:
    _, blocks = build_skeleton(folder, None)
    shape = expert_shape(folder, blocks)
    store = ExpertStore(TensorFiles(folder), {b.layer: f"{b.path}.experts" for b in blocks}, shape)
    return store, ExpertBlock(shape, blocks[0].experts.gate_up_proj.dtype)


def _lru(layers: int, experts: int, _slots: int) -> Policy:
    return LRU(layers, experts)


def _hedge(layers: int, experts: int, slots: int) -> Policy:
    return Hedge(layers, experts, slots, stride=min(SAMPLED, layers))


def _layered(layers: int, experts: int, _slots: int) -> Policy:
    return LayeredLRU(layers, experts)


def exactness(bench: Bench) -> dict[str, Any]:
    """Scores behind the same tokens and routing, beside those of all experts resident."""
    fed = [token % bench.config.shape.vocab for token in range(1, 9)]
    found: dict[str, np.ndarray] = {}
    for arm in bench.arms:
        if isinstance(arm, Ours) or (isinstance(arm, Transformers) and arm.most is None):
            found[arm.name] = arm.scores(fed).numpy()
            arm.figures()
    want = found.get(ALL)
    if want is None:
        return {}
    return {
        name: {
            "same_bits": bool((got == want).all()),
            "error": float(np.linalg.norm(got - want) / np.linalg.norm(want)),
            "same_tokens": bool((got.argmax(-1) == want.argmax(-1)).all()),
        }
        for name, got in found.items()
    }


def run(config: Config, folder: Path, args: argparse.Namespace, began: float) -> dict[str, Any]:
    path = result_path("inference.json", args.json)
    write_model(folder, config.shape, torch.device(config.device))
    say(f"model written after {time.monotonic() - began:.0f} s")
    with ExitStack() as stack:
        return _measured(Bench(config, folder, args.only, stack), folder, args, began, path)


def _measured(bench: Bench, folder: Path, args: argparse.Namespace, began: float, path: Path) -> dict[str, Any]:
    config = bench.config
    say(f"banks ready, rates measured after {time.monotonic() - began:.0f} s")
    every, some = config.shape.total, bench.slots
    percent = f"{config.share:.0%} resident"
    bench.add(ALL, bench.ours(every, _lru, lane=False))
    bench.add(f"ours, {percent}", bench.ours(some, _hedge, lane=True))
    bench.add(f"ours, {percent}{RAW}", bench.ours(some, _hedge, lane=True, packed=False))
    bench.add(f"ours, {percent}, layered LRU", bench.ours(some, _layered, lane=True))
    quarter = max(round(0.25 * every), 2 * config.shape.choices)
    bench.add("ours, a quarter resident", bench.ours(quarter, _hedge, lane=True))
    bench.add(f"ours, {percent}, link only", bench.ours(some, _hedge, lane=False))
    on_demand = f"ours, {percent}, on demand, LRU"
    bench.add(f"{on_demand}, graphs", bench.ours(some, _lru, lane=False))
    bench.add(f"{on_demand}, graphs{RAW}", bench.ours(some, _lru, lane=False, packed=False))
    bench.add(f"{on_demand}{RAW}", bench.ours(some, _lru, lane=False, graphs=False, packed=False))
    for experts in ("batched_mm", "grouped_mm"):
        bench.add(f"transformers, all resident, {experts}", bench.theirs(experts))
    if config.device == "cuda":
        bench.add("transformers with accelerate, experts offloaded", bench.theirs("batched_mm", offloaded=True))
        if args.freetoken:
            peer = partial(FreeToken, wheels=args.freetoken, folder=folder, trace_NLK=bench.trace_NLK, slots=some)
            bench.add(f"FreeToken 0.1.3, {percent}, offload", partial(peer, strategy="offload"))
            for fetch in (2,):
                name = f"FreeToken 0.1.3, {percent}, hybrid, at most {fetch} fetched"
                bench.add(name, partial(peer, strategy="hybrid", fetch=fetch))
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "shape": described(config.shape),
        "config": {k: v for k, v in asdict(config).items() if k != "shape"},
        "slots": some,
        "threads": bench.forms[True].lane.threads,
        "routing": locality(bench.trace_NLK, config.shape.experts),
        "rates": {"packed": asdict(bench.forms[True].rates), "as they are": asdict(bench.forms[False].rates)},
        "skipped": bench.skipped,
    }
    save(path, result)
    result["rows"] = bench.run(began + args.budget_seconds)
    result["exact"] = exactness(bench)
    result["summary"] = summarise(config.shape, [bench.forms[packed].rates for packed in (False, True)], result["rows"])
    save(path, result)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=CONFIGS, default="tiny")
    parser.add_argument("--only", nargs="*", default=[], help="arms whose names contain one of these")
    parser.add_argument("--freetoken", metavar="WHEELS", help="folder with FreeToken 0.1.3 and what it needs, unpacked")
    parser.add_argument("--folder", type=Path, help="where the model is written; /dev/shm by default if it is there")
    parser.add_argument("--budget-seconds", type=float, default=200.0, help="no round begins later")
    parser.add_argument("--json")
    args = parser.parse_args()
    began, config = time.monotonic(), CONFIGS[args.config]
    if config.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this config needs a GPU; use --config tiny")
    root = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="planaria-inference-", dir=args.folder or root) as folder:
        result = run(config, Path(folder), args, began)
    say(tables(result))


if __name__ == "__main__":
    main()
