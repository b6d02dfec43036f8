"""From raw figures to ratios and tables. Pure: the figures are those that benchmarks.checkpoint writes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

_TOLERABLE = 0.02  # of a run's time, for the interval at which a costly save may be made


def _off_beside(blocks: Sequence[Mapping[str, Any]], place: int) -> float | None:
    """The median step of the blocks without checkpoints before and after a block: between them a drift cancels."""
    beside = [b for b in (*blocks[max(place - 1, 0) : place], *blocks[place + 1 : place + 2]) if b["arm"] == "off"]
    return statistics.mean(statistics.median(b["durations"]) for b in beside) if beside else None


def paired_costs(blocks: Sequence[Mapping[str, Any]], arm: str) -> list[float]:
    """For each block of ``arm`` its median step over that of the blocks without checkpoints beside it, minus 1."""
    costs = []
    for place, block in enumerate(blocks):
        if block["arm"] == arm and (off := _off_beside(blocks, place)):
            costs.append(statistics.median(block["durations"]) / off - 1)
    return costs


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Between which values the median of more such values would lie, at 95 %: order statistics, which suppose no
    distribution; the least and the greatest of fewer than six."""
    ordered = sorted(values)
    outside = max(0, math.floor(len(ordered) / 2 - 0.98 * math.sqrt(len(ordered))))
    return ordered[outside], ordered[-1 - outside]


def fastest_quarter(blocks: Sequence[Mapping[str, Any]], arm: str) -> float:
    """The time that the fastest quarter of all steps keeps below: what a busy machine adds is left out."""
    durations: list[float] = sorted(d for b in blocks if b["arm"] == arm for d in b["durations"])
    return durations[len(durations) // 4]


def extra_seconds(blocks: Sequence[Mapping[str, Any]], arm: str) -> list[float]:
    """For each save of ``arm``, what the steps from it until it was safe took beyond as many without checkpoints."""
    extra = []
    for place, block in enumerate(blocks):
        if block["arm"] == arm and (off := _off_beside(blocks, place)):
            extra.append(sum(block["durations"]) - off * len(block["durations"]))
    return extra


def noise(blocks: Sequence[Mapping[str, Any]]) -> float:
    """How far apart blocks without checkpoints are: half the middle spread of their medians over the median."""
    medians = sorted(statistics.median(b["durations"]) for b in blocks if b["arm"] == "off")
    if len(medians) < 2:
        return float("nan")
    low, _, high = statistics.quantiles(medians, n=4)
    return float((high - low) / 2 / statistics.median(medians))


def summarise(result: Mapping[str, Any]) -> dict[str, Any]:
    """One row per arm: milliseconds a step, cost, stall, and recovery; see :func:`tables` for their meaning."""
    blocks = result["blocks"]
    off = [d for b in blocks if b["arm"] == "off" for d in b["durations"]]
    if not off:
        return {}
    step_s = statistics.median(off)
    rows: dict[str, Any] = {}
    for arm in dict.fromkeys(b["arm"] for b in blocks if b["arm"] != "off"):
        mine = [b for b in blocks if b["arm"] == arm]
        if arm in result["arms"]:
            rows[arm] = _every_step(blocks, mine, arm, step_s, result["arms"][arm]["bytes_per_step_per_rank"])
        else:
            rows[arm] = _saves(blocks, mine, arm, step_s)
    _compare(rows)
    recoveries = {arm: _recovery(result, found) for arm, found in result["recoveries"].items() if found}
    for row in recoveries.values():
        if "wal" in recoveries:
            row["total_s_over_wal"] = row["total_s"] / recoveries["wal"]["total_s"]
    return {
        "off_step_s": step_s,
        "off_noise": noise(blocks),
        "tokens_per_s": result["tokens_per_step"] / step_s,
        "rows": rows,
        "recoveries": recoveries,
    }


def _every_step(blocks: Sequence[Any], mine: Sequence[Any], arm: str, step_s: float, nbytes: int) -> dict[str, Any]:
    costs = paired_costs(blocks, arm)
    stalls = [s for b in mine for s in b["stalls"]]
    return {
        "saves_every_step": True,
        "step_s": statistics.median([d for b in mine for d in b["durations"]]),
        "cost": statistics.median(costs),
        "cost_interval": interval(costs),
        "cost_fastest_quarter": fastest_quarter(blocks, arm) / fastest_quarter(blocks, "off") - 1,
        "pairs": len(costs),
        "extra_s_per_save": statistics.median(costs) * step_s,
        "stall_s": statistics.median(stalls),
        "capture_alone_s": (alone := statistics.median([b["drain_s"] for b in mine])),
        "capture_alone_gbps": nbytes / alone / 1e9,
    }


def _saves(blocks: Sequence[Any], mine: Sequence[Any], arm: str, step_s: float) -> dict[str, Any]:
    extra = statistics.median(extra_seconds(blocks, arm))
    return {
        "saves_every_step": False,
        "saves": len(mine),
        "extra_s_per_save": extra,
        "cost": extra / step_s,
        "stall_s": statistics.median([sum(b["stalls"]) for b in mine]),
        "until_safe_s": statistics.median([sum(b["durations"]) for b in mine]),
        "steps_between_saves": max(extra, 0.0) / (_TOLERABLE * step_s),
    }


def _compare(rows: dict[str, Any]) -> None:
    """Add how many times dearer than ``wal`` each arm is, by the cost and by the stall of one save; None where ``wal``
    cost nothing that could be measured."""
    wal = rows.get("wal")
    if wal is None:
        return
    for row in rows.values():
        for name in ("extra_s_per_save", "stall_s"):
            row[f"{name}_over_wal"] = row[name] / wal[name] if wal[name] > 0 else None


def _recovery(result: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = [name for name in found[0] if name.endswith("_s")]
    row: dict[str, Any] = {name: statistics.median([one[name] for one in found]) for name in names}
    row |= {name: found[-1][name] for name in ("redone", "nbytes") if name in found[-1]}
    row["exact"] = all(one["exact"] for one in found)
    ceilings = result["ceilings"]
    if "nbytes" in row and ceilings:
        limit = ceilings["device"].get("h2d") or max(ceilings["memcpy"].values())
        row["floor_s"] = row["nbytes"] / limit / 1e9
        row["apply_over_floor"] = row["apply_s"] / row["floor_s"]
        row["copy_over_floor"] = row["copy_s"] / row["floor_s"]
    return row


def tables(result: Mapping[str, Any]) -> str:
    """What a reader wants: costs, recoveries and the limits beside them."""
    summary = result["summary"]
    if not summary:
        return "nothing was measured"
    lines = [
        "",
        f"{result['tokens_per_step']:,} tokens a step, {result['state_bytes_per_rank'] / 1e9:.2f} GB of state a rank, "
        f"{result['world']} rank(s); without checkpoints {1e3 * summary['off_step_s']:.1f} ms a step "
        f"(+- {summary['off_noise']:.1%} from block to block), {summary['tokens_per_s']:,.0f} tokens/s",
        "",
        "arm               cost of a save   of a step   stall       x wal (cost)  x wal (stall)   saved",
    ]
    lines += [_cost_line(arm, row) for arm, row in summary["rows"].items()]
    lines += [
        f"{arm}: a capture alone, without training beside it, {1e3 * row['capture_alone_s']:.1f} ms, "
        f"{row['capture_alone_gbps']:.1f} GB/s a rank; cost {row['cost']:.1%}, with 95 % certainty "
        f"{row['cost_interval'][0]:.1%} to {row['cost_interval'][1]:.1%} ({row['pairs']} pairs of blocks); of the "
        f"fastest quarter of steps {row['cost_fastest_quarter']:.1%}"
        for arm, row in summary["rows"].items()
        if row["saves_every_step"]
    ]
    lines += [
        "",
        "recovery          total s    x wal  attach  restore  (proof)  (check)   (pin)  (apply)  (redo)  copy alone  "
        "x floor  exact",
    ]
    lines += [_recovery_line(arm, row) for arm, row in summary["recoveries"].items()]
    lines += ["", "limits in GB/s"]
    lines += [
        f"  {what:10s} " + "  ".join(f"{name}: {value:.2f}" for name, value in found.items())
        for what, found in result["ceilings"].items()
        if found
    ]
    lines += [f"left out: {what}: {why}" for what, why in result["skipped"].items()]
    return "\n".join(lines)


def _cost_line(arm: str, row: Mapping[str, Any]) -> str:
    often = "every step"
    if not row["saves_every_step"]:
        often = f"every {row['steps_between_saves']:,.0f} steps for {_TOLERABLE:.0%}"
    return (
        f"{arm:16s} {1e3 * row['extra_s_per_save']:12.1f} ms  {row['cost']:9.1%}  {1e3 * row['stall_s']:8.2f} ms  "
        f"{_times(row, 'extra_s_per_save_over_wal'):>11}  {_times(row, 'stall_s_over_wal'):>13}   {often}"
    )


def _times(row: Mapping[str, Any], name: str) -> str:
    return "-" if row.get(name) is None else f"{row[name]:.1f}"


def _recovery_line(arm: str, row: Mapping[str, Any]) -> str:
    widths = {"attach_s": 6, "restore_s": 7, "verify_s": 7, "check_s": 7, "pin_s": 6, "apply_s": 7, "redo_s": 6}
    parts = "  ".join(f"{row[name]:{width}.3f}" if name in row else f"{'-':>{width}}" for name, width in widths.items())
    alone = (
        f"{row['copy_s']:10.3f}  {row['copy_over_floor']:7.2f}" if "copy_over_floor" in row else f"{'-':>10}  {'-':>7}"
    )
    return (
        f"{arm:16s} {row['total_s']:8.3f}  {_times(row, 'total_s_over_wal'):>7}  {parts}  {alone}  "
        f"{'yes' if row['exact'] else 'NO'}"
    )
