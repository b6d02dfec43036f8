"""Adapters: one step of ours beside the peers', with the frozen model as the floor.

The arms of a case take turns in each round, in another order each time, over the same weights and inputs, and medians
are compared. Values are compared first: a case whose arms compute something else ends there.

``python -m benchmarks.lora --config cpu|qwen3|tiny --case experts|routed|ffn|concurrent|all``; on a CPU one thread, and
its own time, not the wall's.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import random
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.lora_case import Arm, Case, Claim
from benchmarks.machine import describe_machine, result_path, save, say, timed

CASES = ("experts", "routed", "ffn", "concurrent")
CONFIGS = ("cpu", "qwen3", "tiny")
_GPU = ("qwen3",)


class Unequal(Exception):
    """Arms of one case do not compute the same."""


def measure(case: Case, device: torch.device, rounds: int, until: float) -> dict[str, Any]:
    """Parity, bytes and then times of every arm; fewer rounds if the clock reaches ``until``. Raises Unequal."""
    rows = {arm.name: {"role": arm.role, "note": arm.note, "tokens": arm.tokens} for arm in case.arms}
    for name, error in parity(case).items():
        rows[name]["error"] = error
    for arm in case.arms:
        rows[arm.name] |= {"saved_bytes": saved_bytes(arm), "peak_bytes": peak_bytes(arm, device)}
    times: dict[str, list[float]] = {arm.name: [] for arm in case.arms}
    for number in range(rounds):
        # Shuffled, each round in another way: what an arm leaves in the caches and the heap meets all alike.
        for arm in random.Random(number).sample(case.arms, len(case.arms)):
            times[arm.name].append(timed(lambda arm=arm: arm.step(False), device))
        if time.monotonic() > until:
            break
    for name, found in times.items():
        rows[name] |= {"s": statistics.median(found), "rounds": len(found)}
    return {"rows": rows, "claims": [judged(claim, rows) for claim in case.claims]}


def parity(case: Case) -> dict[str, float]:
    """Each exact arm's largest relative error to the first one's values. Also the first call, which may compile."""
    reference: dict[str, Tensor] | None = None
    errors = {}
    for arm in case.arms:
        found = {key: value.detach().clone() for key, value in arm.step(True).items()} if arm.exact else arm.step(False)
        if not arm.exact:
            continue
        reference = reference or dict(found)
        if found.keys() != reference.keys():
            raise Unequal(f"{case.title}: {arm.name} returns {sorted(found)}, not {sorted(reference)}")
        each = {key: _error(found[key], want) for key, want in reference.items()}
        worst = max(each, key=lambda key: each[key])
        errors[arm.name] = each[worst]
        if not each[worst] <= case.tolerance:
            raise Unequal(f"{case.title}: {arm.name}: {worst} is off by {each[worst]:.1e}, over {case.tolerance:.0e}")
    return errors


def _error(got: Tensor, want: Tensor) -> float:
    want = want.double()
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


def saved_bytes(arm: Arm) -> int | None:
    """Distinct storages that the forward keeps for the backward, but for parameters and inputs."""
    if arm.forward is None:
        return None
    known = {t.untyped_storage().data_ptr() for t in arm.known}
    kept: dict[int, int] = {}
    alive = []  # a freed storage's address may come again

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        graph = arm.forward()
    del graph
    return sum(kept.values())


def peak_bytes(arm: Arm, device: torch.device) -> int | None:
    """The most that a step needs beyond what was there before it; CUDA only."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    arm.step(False)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def judged(claim: Claim, rows: dict[str, Any]) -> dict[str, Any]:
    """A claim with its ratio; None where an arm or a figure is missing."""
    mine, theirs = (_figure(rows.get(name), claim.what) for name in (claim.ours, claim.against))
    ratio = mine / theirs if mine is not None and theirs else None
    return vars(claim) | {"ratio": ratio, "met": None if ratio is None else ratio <= claim.limit}


def _figure(row: dict[str, Any] | None, what: str) -> float | None:
    if row is None:
        return None
    return row["s"] / row["tokens"] if what == "time" else row[f"{what}_bytes"]


def table(case: Case, result: dict[str, Any]) -> str:
    rows = result["rows"]
    floor = next((row["s"] / row["tokens"] for row in rows.values() if row["role"] == "floor"), None)
    lines = ["", case.title, f"  {'':32s} {'ms':>9}  of floor  saved MB   peak MB   error  rounds"]
    for name, row in rows.items():
        times = f"{row['s'] / row['tokens'] / floor:8.2f}x" if floor else f"{'-':>9}"
        saved, peak = (_mb(row[key]) for key in ("saved_bytes", "peak_bytes"))
        error = f"{row['error']:7.0e}" if "error" in row else f"{'-':>7}"
        lines.append(
            f"  {name:32s} {1e3 * row['s']:9.2f} {times} {saved} {peak} {error}  {row['rounds']:6d}  {row['note']}"
        )
    for claim in result["claims"]:
        verdict = {True: "met", False: "MISSED", None: "not measured"}[claim["met"]]
        ratio = "-" if claim["ratio"] is None else f"{claim['ratio']:.3f}"
        pair = f"{claim['ours']} / {claim['against']}"
        lines.append(f"    {claim['what']} of {pair}: {ratio}, at most {claim['limit']:g}: {verdict}")
    lines += [f"  left out: {name}: {why}" for name, why in (case.skipped or {}).items()]
    return "\n".join(lines)


def _mb(count: int | None) -> str:
    return f"{'-':>9}" if count is None else f"{count / 1e6:9.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=CONFIGS, required=True)
    parser.add_argument("--case", nargs="+", choices=(*CASES, "all"), default=["all"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget-seconds", type=float, default=480, help="after which no further round begins")
    parser.add_argument("--json", help="where to write the figures")
    options = parser.parse_args()
    wanted = CASES if "all" in options.case else tuple(options.case)
    path = result_path(f"lora-{options.config}-{'-'.join(options.case)}.json", options.json)
    device = torch.device("cuda" if options.config in _GPU else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--config {options.config} needs a CUDA device; use cpu or tiny here")
    if device.type == "cpu":
        torch.set_num_threads(1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    until = time.monotonic() + options.budget_seconds
    result: dict[str, Any] = {"machine": describe_machine(), "cases": {}}
    for name in wanted:
        for case in importlib.import_module(f"benchmarks.lora_{name}").cases(options.config, device, dtype):
            found = measure(case, device, options.rounds, until)
            result["cases"][f"{name}: {case.title}"] = found | {"skipped": dict(case.skipped or {})}
            say(table(case, found))
            save(path, result)
            del case
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    say(f"written to {path}")


if __name__ == "__main__":
    main()
