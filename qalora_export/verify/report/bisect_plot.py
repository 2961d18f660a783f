"""Error by layer as a small SVG, written out by hand: no drawing library, the same bytes for the same numbers."""

from __future__ import annotations

import base64
import math
from html import escape

from qalora_export.verify.bisect.search import Bisection, Step

WIDTH, ROW, LEFT, RIGHT, TOP = 720, 18, 250, 70, 44
LOWEST, HIGHEST = -16, 2  # decades of NMSE that the axis shows
GOOD, BAD, LINE, TEXT = "#4878a8", "#c0392b", "#888", "#222"


def error_plot(found: Bisection) -> str:
    """One bar per layer, then one per tensor inside the first wrong layer; red beyond the bound (the tick)."""
    rows = [*((step, 0) for step in found.layers), *((step, 14) for step in found.inside)]
    height = TOP + ROW * len(rows) + 26
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="sans-serif" font-size="11" fill="{TEXT}">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="8" y="16" font-size="13">{escape(f"{found.runtime}, {found.path} path, {found.mode}")}</text>',
        f'<text x="8" y="32" fill="#555">{escape(found.describe())}</text>',
        *(_row(step, TOP + ROW * index, indent) for index, (step, indent) in enumerate(rows)),
        *_axis(TOP, height - 22),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def data_uri(svg: str) -> str:
    """For a page that needs no other file."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode("ascii")


def _row(step: Step, y: int, indent: int) -> str:
    colour = BAD if step.diverges else GOOD
    end, bound = _x(step.nmse), _x(step.bound)
    figure = "no value" if math.isnan(step.nmse) else f"{step.nmse:.1e}"
    return (
        f"<g><title>{escape(step.what)}</title>"
        f'<text x="{8 + indent}" y="{y + 12}">{escape(step.name)}</text>'
        f'<rect x="{LEFT}" y="{y + 3}" width="{end - LEFT:.1f}" height="{ROW - 6}" fill="{colour}"/>'
        f'<line x1="{bound:.1f}" x2="{bound:.1f}" y1="{y + 1}" y2="{y + ROW - 1}" stroke="{TEXT}"/>'
        f'<text x="{WIDTH - RIGHT + 8}" y="{y + 12}" fill="{colour}">{figure}</text></g>'
    )


def _axis(top: int, bottom: int) -> list[str]:
    """Grid and labels every four decades."""
    lines = []
    for decade in range(LOWEST, HIGHEST + 1, 4):
        x = _x(10.0**decade)
        lines.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="{LINE}" stroke-opacity=".3"/>')
        lines.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle" fill="#555">1e{decade}</text>')
    return lines


def _x(nmse: float) -> float:
    """Place on a logarithmic axis; zero at its left end, infinity at its right."""
    if math.isnan(nmse) or nmse <= 0:
        return LEFT
    decades = HIGHEST if math.isinf(nmse) else min(max(math.log10(nmse), LOWEST), HIGHEST)
    return LEFT + (WIDTH - LEFT - RIGHT) * (decades - LOWEST) / (HIGHEST - LOWEST)
