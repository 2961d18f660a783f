"""Plots of report.html as data: URIs, so the page needs no other file and no network."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.verify.gates.g2_exact_path import NMSE
from qalora_export.verify.metrics import PositionMetrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Positions = dict[tuple[str, str], PositionMetrics]
# path in report.positions -> legend, colour (safe for the colour-blind: Okabe and Ito)
SERIES = {
    "simulated": ("int8 simulated in PyTorch", "#8c8c8c"),
    "shipped": ("shipped path", "#d55e00"),
    "exact": ("exact path", "#0072b2"),
}
SMALLEST = 1e-17  # where zeros are drawn on a logarithmic axis
WIDTH, ROW_HEIGHT, DPI = 11.0, 2.3, 120


def error_by_position(positions: Positions, runtimes: list[str], lengths: list[int]) -> str:
    """NMSE at every position of the probe set, one row per runtime."""
    figure, axes = _rows(len(runtimes))
    ends = np.cumsum(lengths)
    for axis, runtime in zip(axes, runtimes, strict=True):
        for start, end in zip(ends[:-1:2], ends[1::2], strict=False):
            axis.axvspan(start - 0.5, end - 0.5, color="#f3f3f3", zorder=0, linewidth=0)
        for path in ("simulated", "shipped", "exact"):
            if metrics := positions.get((runtime, path)):
                _scatter(axis, metrics, *SERIES[path])
        axis.axhline(NMSE.bound, color="#0072b2", linewidth=1, linestyle="--", label="bound of the exact path")
        axis.set(yscale="log", ylabel="NMSE", xlim=(-0.5, max(ends[-1] - 0.5, 1)))
        _title(axis, runtime)
    _legend(axes[0], ncols=4, markerscale=4, loc="lower right", bbox_to_anchor=(1, 1))
    axes[-1].set_xlabel("position of the probe set (a stripe is a sequence; crosses hold NaN or Inf)")
    return _data_uri(figure)


def kl_histogram(positions: Positions, runtimes: list[str]) -> str:
    """How KL(reference‖runtime) is spread over positions: shipped path beside simulated int8 activations."""
    figure, axes = _columns(len(runtimes))
    edges = np.logspace(-9, 1, 61)
    for axis, runtime in zip(axes, runtimes, strict=True):
        for path, style in (("simulated", "stepfilled"), ("shipped", "step")):
            if metrics := positions.get((runtime, path)):
                label, colour = SERIES[path]
                values = np.clip(np.nan_to_num(metrics.kl, nan=edges[-1]), edges[0], edges[-1])
                faint = {"alpha": 0.35} if style == "stepfilled" else {"linewidth": 1.6}
                axis.hist(values, edges, histtype=style, label=label, color=colour, **faint)
        axis.set(xscale="log", xlabel="KL, nats")
        _title(axis, runtime)
    axes[0].set_ylabel("positions")
    _legend(axes[0])
    return _data_uri(figure)


def agreement(positions: Positions, runtimes: list[str]) -> str:
    """Share of positions where the runtime's first choice is the reference's, by path."""
    figure, (axis,) = _columns(1, height=0.5 + 0.32 * 3 * max(1, len(runtimes)))
    labels, values, colours = [], [], []
    for runtime in runtimes:
        for path in ("exact", "shipped", "simulated"):
            label, colour = SERIES[path]
            if metrics := positions.get((runtime, path)):
                labels.append(f"{runtime}, {label}")
                values.append(100 * float(metrics.agree.mean()))
                colours.append(colour)
    bars = axis.barh(range(len(values)), values, color=colours)
    axis.bar_label(bars, labels=[f"{value:.2f} %" for value in values], padding=3, fontsize=8)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set(
        xlim=(max(0.0, min([95.0, *values]) - 5), 101), xlabel="same first choice as the reference, % of positions"
    )
    return _data_uri(figure)


def _scatter(axis: Any, metrics: PositionMetrics, label: str, colour: str) -> None:
    values: NDArray[np.float64] = np.maximum(np.nan_to_num(metrics.nmse, nan=1.0), SMALLEST)
    places = np.arange(values.size)
    axis.plot(places, values, ".", markersize=2.2, color=colour, label=label)
    if metrics.bad.any():
        axis.plot(places[metrics.bad], values[metrics.bad], "x", markersize=7, color="#cc0000")


def _legend(axis: Any, **options: Any) -> None:
    if axis.get_legend_handles_labels()[0]:  # nothing was drawn when no run of the runtime succeeded
        axis.legend(fontsize=8, frameon=False, **options)


def _title(axis: Any, text: str) -> None:
    axis.set_title(text, loc="left", fontsize=10)


def _rows(count: int) -> tuple[Figure, list[Any]]:
    return _grid(count, 1, (WIDTH, 0.6 + ROW_HEIGHT * count))


def _columns(count: int, height: float = 2.9) -> tuple[Figure, list[Any]]:
    return _grid(1, count, (WIDTH, height))


def _grid(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Any]]:
    """Plots below each other share the horizontal axis, plots beside each other the vertical one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = list(
        np.atleast_1d(figure.subplots(rows, columns, squeeze=False, sharex=rows > 1, sharey=columns > 1).ravel())
    )
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes


def _data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
