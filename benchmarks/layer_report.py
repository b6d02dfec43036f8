"""From the figures of benchmarks.moe_layer to tables and ratios. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EAGER, GROUPED = "transformers eager", "transformers grouped_mm"


def fastest(rows: Mapping[str, Any], prefix: str) -> str | None:
    """The fastest arm whose name begins so."""
    names = [name for name in rows if name.startswith(prefix)]
    return min(names, key=lambda name: rows[name]["s"]) if names else None


def ratios(rows: Mapping[str, Any]) -> dict[str, float]:
    """How many times faster our fastest arm is than each other, and how much less it saves and needs at its peak."""
    ours = fastest(rows, "ours ")
    if ours is None:
        return {}
    mine = rows[ours]
    found = {f"speed over {name}": rows[name]["s"] / mine["s"] for name in rows if not name.startswith("ours ")}
    best = fastest(rows, "transformers ")
    if best is not None:
        found["speed over transformers' best"] = rows[best]["s"] / mine["s"]
    if GROUPED in rows:
        for what in ("saved_bytes", "peak_bytes"):
            if rows[GROUPED][what]:
                found[f"{what} over {GROUPED}"] = mine[what] / rows[GROUPED][what]
    return found


def table(title: str, layer: Mapping[str, Any], flops: int) -> str:
    """One layer's arms under both routings; see :func:`ratios` for the last lines."""
    ceiling = layer["ceiling_flops"]
    lines = ["", f"{title}, {flops / 1e12:.3g} TFLOP, one product reaches {ceiling / 1e12:.3g} TFLOP/s"]
    for routing in ("balanced", "skewed"):
        lines.append(f"  {routing:24s} {'ms':>9}  of ceiling  saved MB   peak MB  error out / dx / d scores   rounds")
        lines += [_line(name, row, flops / ceiling) for name, row in layer[routing].items()]
        ours = fastest(layer[routing], "ours ")
        lines += [f"    {ours}: {what} {value:.2f}" for what, value in ratios(layer[routing]).items()]
    lines += [f"  left out: {name}: {why}" for name, why in layer["skipped"].items()]
    return "\n".join(lines)


def _line(name: str, row: Mapping[str, Any], floor_s: float) -> str:
    error = row["error"]
    parity = f"{error['out']:.0e} / {error['dx']:.0e} / {error['dw']:.0e}"
    if not row["exact"]:
        parity = f"drops ({error['out']:.0e})"
    peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.1f}"
    return (
        f"  {name:24s} {1e3 * row['s']:9.2f}  {floor_s / row['s']:9.1%}  {row['saved_bytes'] / 1e6:9.2f} {peak:>9}"
        f"  {parity:27s} {len(row['times_s']):4d}"
    )
