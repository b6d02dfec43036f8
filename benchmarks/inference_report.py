"""The inference benchmark's figures as ratios and a table. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ALL = "ours, all resident"
RAW = ", not packed"


def ours_of(names: Sequence[str]) -> str | None:
    """The arm that the ratios are about: ours with a share resident and every lane."""
    return next((name for name in names if name.startswith("ours, ") and name.endswith("% resident")), None)


def summarise(shape: Any, rates: Sequence[Any], rows: Mapping[str, Any]) -> dict[str, Any]:
    """Per arm tokens/s, experts per token by what became of them, the floor and the share of it; and the ratios.

    ``rates``: of experts as they are, and packed.
    """
    arms: dict[str, Any] = {}
    for name, row in rows.items():
        best = min(row["times_s"])
        arms[name] = {"tokens_per_s": 1 / row["s"], "ms": 1e3 * row["s"], "best_tokens_per_s": 1 / best}
        if name.startswith("ours, "):
            arms[name] |= _per_token(shape, rates[not name.endswith(RAW)], name, row)
    return {"arms": arms, "ratios": _ratios(arms)}


def _per_token(shape: Any, rates: Any, name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    tokens = sum(figures["tokens"] for figures in row["figures"])

    def mean(key: str) -> float:
        return float(sum(figures[key] for figures in row["figures"]) / tokens)

    used = shape.layers * shape.choices
    resident = float(used) if name == ALL else mean("resident")
    floor = rates.floor(shape, resident, mean("fetched"), mean("computed"))
    return {
        "hit_rate": resident / used,
        "fetched": mean("fetched"),
        "computed": mean("computed"),
        "behind": mean("behind"),
        "floor": floor,
        "share_of_floor": floor["s"] / row["s"],
        "host_ms": {key: 1e3 * mean(key) for key in ("asked_s", "given_s", "books_s", "lane_s")},
    }


def _ratios(arms: Mapping[str, Any]) -> dict[str, float]:
    ratios: dict[str, float] = {}
    ours = ours_of(list(arms))
    for name, arm in arms.items():
        if ours and name not in (ours, ALL) and not name.startswith("transformers, all"):
            ratios[f"{ours} / {name}"] = arms[ours]["tokens_per_s"] / arm["tokens_per_s"]
        if ALL in arms and name.startswith("transformers, all"):
            ratios[f"{ALL} / {name}"] = arms[ALL]["tokens_per_s"] / arm["tokens_per_s"]
            ratios[f"{ALL} / {name}, its best round"] = arms[ALL]["tokens_per_s"] / arm["best_tokens_per_s"]
    if ours and ALL in arms:
        ratios[f"{ours} / {ALL}"] = arms[ours]["tokens_per_s"] / arms[ALL]["tokens_per_s"]
    return ratios


def tables(result: Mapping[str, Any]) -> str:
    """What a reader wants: rates, arms beside their floors, ratios, exactness."""
    summary, routing = result["summary"], result["routing"]
    lines = [
        "",
        f"{', '.join(result['machine']['gpus']) or 'no GPU'}; commit {result['machine']['commit']}; "
        f"{result['slots']} slots; a token shares {routing['shared_with_last']:.0%} of its experts with the last, "
        f"the popular half takes {routing['popular_half']:.0%}",
        *(_rates(form, rates) for form, rates in result["rates"].items()),
        "",
        "tokens/s       ms   (min to max)   hits  fetched  on CPU   floor ms  share  arm",
    ]
    for name, arm in summary["arms"].items():
        times = [1e3 * s for s in result["rows"][name]["times_s"]]
        line = f"{arm['tokens_per_s']:8.1f} {arm['ms']:8.2f}  {min(times):6.2f}-{max(times):7.2f}  "
        if "floor" in arm:
            line += f"{arm['hit_rate']:5.0%}  {arm['fetched']:7.1f}  {arm['computed']:6.1f}   "
            line += f"{1e3 * arm['floor']['s']:8.2f}  {arm['share_of_floor']:5.0%}  "
        else:
            line += " " * 47
        lines.append(line + name)
    lines += ["", *(f"{ratio:8.2f}  {name}" for name, ratio in summary["ratios"].items()), ""]
    for name, found in result.get("exact", {}).items():
        verdict = "the bits of all resident" if found["same_bits"] else f"error {found['error']:.1e}"
        lines.append(f"{name}: {verdict}, tokens {'the same' if found['same_tokens'] else 'DIFFER'}")
    for name, arm in summary["arms"].items():
        if "host_ms" in arm:
            lines.append(f"{name}: host ms a token " + ", ".join(f"{k} {v:.2f}" for k, v in arm["host_ms"].items()))
    lines += [f"left out: {what}: {why}" for what, why in result["skipped"].items()]
    return "\n".join(lines)


def _rates(form: str, rates: Mapping[str, Any]) -> str:
    gb = {name: f"{rates[name] / 1e9:.1f}" for name in ("link", "link_beside", "lane", "lane_beside", "memory")}
    return (
        f"experts {form}, {rates['host_bytes'] / 1e6:.2f} MB: link {gb['link']} GB/s, beside the CPU "
        f"{gb['link_beside']}; CPU lane {gb['lane']}, beside the link {gb['lane_beside']}; GPU memory {gb['memory']}; "
        f"a call of 1, 2, ... experts on the CPU, link busy: {', '.join(f'{1e6 * s:.0f}' for s in rates['lane_s'])} us"
    )
