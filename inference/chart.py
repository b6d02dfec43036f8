"""A chart of lines as SVG text, without a plotting library. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
_WIDTH, _HEIGHT, _LEFT, _TOP, _LEGEND = 420, 260, 60, 40, 170


@dataclass(frozen=True)
class Panel:
    """One diagram: ``lines`` by name, each of points (x, y)."""

    title: str
    x_label: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def svg(panels: Sequence[Panel]) -> str:
    """Panels side by side; a name has one colour in all of them, and the legend is at the right."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    dashes = {name: "" if i < len(_COLOURS) else ' stroke-dasharray="5 3"' for i, name in enumerate(names)}
    step = _LEFT + _WIDTH + 20
    width, height = len(panels) * step + _LEGEND, _TOP + _HEIGHT + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for i, panel in enumerate(panels):
        parts += _panel(panel, i * step + _LEFT, colours, dashes)
    for i, name in enumerate(names):
        y = _TOP + 10 + 18 * i
        x = len(panels) * step
        parts.append(
            f'<line x1="{x}" y1="{y}" x2="{x + 24}" y2="{y}" stroke="{colours[name]}" stroke-width="2"{dashes[name]}/>'
        )
        parts.append(f'<text x="{x + 30}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, left: int, colours: Mapping[str, str], dashes: Mapping[str, str]) -> list[str]:
    points = [point for line in panel.lines.values() for point in line]
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    top = max(y for _, y in points) * 1.05 or 1.0
    bottom = _TOP + _HEIGHT

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (x - low) / (high - low or 1.0) * _WIDTH, bottom - max(y, 0.0) / top * _HEIGHT

    parts = [
        f'<text x="{left}" y="{_TOP - 14}" font-weight="bold">{escape(panel.title)}</text>',
        f'<rect x="{left}" y="{_TOP}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="#888"/>',
        f'<text x="{left + _WIDTH / 2}" y="{bottom + 36}" text-anchor="middle">{escape(panel.x_label)}</text>',
    ]
    for i in range(5):
        value = top * i / 4
        y = place(low, value)[1]
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + _WIDTH}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for x in sorted({x for x, _ in points}):
        at = place(x, 0)[0]
        parts.append(f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{x:g}</text>')
    for name, line in panel.lines.items():
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in sorted(line)))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="2"{dashes[name]}/>')
    return parts
