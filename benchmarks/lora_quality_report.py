"""Tables and the plot of the quality benchmark, from its figures alone (no torch here)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

LORA, ORACLE, LARGE_ORACLE = "lora", "one lora per task", "one lora per task, 8x"
GOAL = 0.7


def closed(value: float, lora: float, oracle: float) -> float:
    """Share of the gap between one LoRA and one per task. NaN where there is no gap.

    >>> closed(0.8, 0.5, 0.9)
    0.7500000000000001
    """
    return (value - lora) / (oracle - lora) if oracle > lora else float("nan")


def summarise(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """One row per arm from its runs, of which each has ``seed``, ``exact``, ``mean``, ``worst`` and ``routing``.

    The gap is closed seed by seed, where the arm, the LoRA and the oracle all ran.
    """
    means = {arm: {run["seed"]: run["mean"] for run in found} for arm, found in runs.items()}
    rows = {}
    for arm, found in runs.items():
        if not found:
            continue
        routed = [run["routing"] for run in found if run["routing"]]
        row: dict[str, Any] = {
            "seeds": len(found),
            "mean": statistics.fmean(run["mean"] for run in found),
            "spread": [min(run["mean"] for run in found), max(run["mean"] for run in found)],
            "worst": statistics.fmean(run["worst"] for run in found),
            "exact": {task: statistics.fmean(run["exact"][task] for run in found) for task in found[0]["exact"]},
        }
        for name, oracle in (("closed", ORACLE), ("closed_large", LARGE_ORACLE)):
            common = sorted(set(means[arm]) & set(means.get(LORA, {})) & set(means.get(oracle, {})))
            shares = [closed(means[arm][s], means[LORA][s], means[oracle][s]) for s in common]
            row[name] = shares
        if routed:
            row["information"] = statistics.fmean(r["information"] for r in routed)
            row["most_information"] = statistics.fmean(r["most_information"] for r in routed)
            row["dead"] = sum(r["dead"] for r in routed) / sum(r["experts"] for r in routed)
        rows[arm] = row
    return rows


def table(rows: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Mapping[str, Any]]) -> str:
    """A row per arm, best first. ``facts``: of each arm ``parameters``, ``lr`` and ``kind``."""
    lines = [
        "| arm | parameters | lr | exact match | worst task | gap closed (least, most) | of the 8x gap | "
        "I(task; expert), bits (best router) | dead |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, row in sorted(rows.items(), key=lambda item: -item[1]["mean"]):
        known = facts[arm]
        lines.append(
            f"| {arm}{known['kind']} | {known['parameters']:,} | {known['lr']:g} | {100 * row['mean']:.1f} % "
            f"({100 * row['spread'][0]:.1f} to {100 * row['spread'][1]:.1f}) | {100 * row['worst']:.1f} % | "
            f"{_shares(row['closed'])} | {_shares(row['closed_large'], brief=True)} | {_routing(row)} |"
        )
    return "\n".join(lines)


def _shares(shares: Sequence[float], brief: bool = False) -> str:
    if not shares:
        return ""
    mean = f"{100 * statistics.fmean(shares):.0f} %"
    return mean if brief else f"{mean} ({100 * min(shares):.0f} to {100 * max(shares):.0f})"


def _routing(row: Mapping[str, Any]) -> str:
    if "information" not in row:
        return " | "
    return f"{row['information']:.2f} ({row['most_information']:.2f}) | {100 * row['dead']:.0f} %"


def task_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Exact match of each task, in per cent, the mean over seeds."""
    tasks = list(next(iter(rows.values()))["exact"])
    lines = [f"| arm | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for arm, row in sorted(rows.items(), key=lambda item: -item[1]["mean"]):
        scores = [f"{100 * row['exact'][task]:.0f}" for task in tasks]
        lines.append(f"| {arm} | {' | '.join(scores)} |")
    return "\n".join(lines)


def verdict(rows: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Mapping[str, Any]]) -> str:
    """The best routed preset, whether it closes GOAL of the gap, and what of it is left beside the best without router.

    The latter, because one LoRA may be put on other layers, too.
    """
    if ORACLE not in rows or LORA not in rows:
        return "no verdict: one plain LoRA or one LoRA per task is missing"
    if not all(share == share for share in rows[ORACLE]["closed"]):
        return "no verdict: in some seed one LoRA per task is no better than one LoRA; train for longer"
    said = []
    for what, kinds in (("preset as published", {"routed"}), ("with other values", {"routed", "variant"})):
        routed = {a: r for a, r in rows.items() if facts[a]["group"] in kinds and r["closed"]}
        if not routed:
            said.append(f"{what}: none was run")
            continue
        best = max(routed, key=lambda arm: statistics.fmean(routed[arm]["closed"]))
        share = statistics.fmean(routed[best]["closed"])
        word = "reached" if share >= GOAL else "not reached"
        said.append(f"{what}: {best} closes {100 * share:.0f} % of the gap; {100 * GOAL:.0f} % {word}")
        plain = {a: r["mean"] for a, r in rows.items() if a == LORA or facts[a]["group"] == "plain"}
        rival = max(plain, key=lambda arm: plain[arm])
        if rival != LORA:
            rest = closed(routed[best]["mean"], plain[rival], rows[ORACLE]["mean"])
            said.append(f"  measured from the best arm without a router, {rival}: {100 * rest:.0f} %")
    return "\n".join(said)


_COLOURS = {"bound": "#555", "routed": "#2a6fbb", "variant": "#7fb0dd", "plain": "#b5651d", "task": "#8a5fb5"}
_LEGEND = {
    "bound": "one LoRA, one per task",
    "routed": "routed preset",
    "variant": "routed, other values",
    "plain": "without router",
    "task": "told the task",
}


def plot(rows: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Mapping[str, Any]], title: str) -> str:
    """An SVG: a bar of mean exact match for each arm, the seeds' range on it, the worst task as a dot."""
    left, width, step = 190, 460, 22
    order = sorted(rows, key=lambda arm: -rows[arm]["mean"])
    top, height = 58, 58 + step * len(order) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 80}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="18" font-size="14">{escape(title)}</text>',
    ]
    x = 10
    for group, label in _LEGEND.items():
        parts.append(f'<rect x="{x}" y="28" width="11" height="11" fill="{_COLOURS[group]}"/>')
        parts.append(f'<text x="{x + 15}" y="38">{escape(label)}</text>')
        x += 30 + 7 * len(label)
    for percent in range(0, 101, 20):
        at = left + width * percent / 100
        parts.append(f'<line x1="{at}" y1="{top - 6}" x2="{at}" y2="{height - 30}" stroke="#ddd"/>')
        parts.append(f'<text x="{at}" y="{height - 14}" text-anchor="middle">{percent} %</text>')
    for place, arm in enumerate(order):
        row, y = rows[arm], top + step * place
        colour = _COLOURS[facts[arm]["group"]]
        mean, worst = width * row["mean"], width * row["worst"]
        low, high = (left + width * v for v in row["spread"])
        parts += [
            f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{escape(arm)}</text>',
            f'<rect x="{left}" y="{y}" width="{mean:.1f}" height="15" fill="{colour}"/>',
            f'<line x1="{low:.1f}" y1="{y + 7}" x2="{high:.1f}" y2="{y + 7}" stroke="black"/>',
            f'<circle cx="{left + worst:.1f}" cy="{y + 7.5}" r="3.5" fill="white" stroke="black"/>',
            f'<text x="{high + 6:.1f}" y="{y + 12}">{100 * mean / width:.0f}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"
