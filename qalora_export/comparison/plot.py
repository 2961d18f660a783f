"""Held-out loss and task score against bits per weight as deployed and tokens per second, one point per row."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qalora_export.comparison.table import Row
from qalora_export.safety import atomic_file

MARKERS = "osD^vPX*<>"
# As many again in other tones, so that of twenty methods no two have both marker and colour in common.
COLOURS = [*(f"C{index}" for index in range(10)), "navy", "gold", "black", "lime", "deeppink", "teal", "cyan", "indigo"]
COLOURS += ["maroon", "tan"]
TICKS = (2, 3, 4, 6, 8, 16)


def plot_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write the plot as PNG. A method of several widths is a line; whiskers are the range over seeds.

    The panels over tokens per second, of llama.cpp decoding, are there when a row was timed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [row for row in rows if row.mean_loss is not None]
    timed = [row for row in shown if row.speed is not None]
    columns = 2 if timed else 1
    figure, axes = plt.subplots(2, columns, figsize=(7 * columns, 9), sharey="row", squeeze=False, layout="constrained")
    what = "text" if any(row.text for row in shown) else "answers"
    methods = list(dict.fromkeys(row.method for row in shown))
    for line, (label, values_of) in enumerate(
        (
            (f"loss of held-out {what}, nats per token", lambda row: row.judged),
            ("exact answers, %", lambda row: [100 * share for share in row.score]),
        )
    ):
        _points(axes[line, 0], methods, shown, lambda row: row.bits_per_weight, values_of)
        axes[line, 0].set(xlabel="bits per weight as deployed", ylabel=label)
        axes[line, 0].set_xscale("log", base=2)
        axes[line, 0].set_xticks(TICKS, [str(tick) for tick in TICKS])
        if timed:
            _points(
                axes[line, 1], methods, timed, lambda row: row.speed.tokens_per_second if row.speed else 0.0, values_of
            )
            axes[line, 1].set(xlabel="tokens per second, llama.cpp decoding")
    for each in axes.flat:
        each.grid(alpha=0.25)
    _only_trained(axes[0, 0], shown)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    with atomic_file(path, force=True) as temporary:
        figure.savefig(temporary, format="png", dpi=140, metadata={"Software": None})
    plt.close(figure)


def _only_trained(axes: Any, rows: Sequence[Row]) -> None:
    """Show the losses of trained rows only, which are close together, and say where the others are."""
    trained = [loss for row in rows if row.trainable for loss in row.judged]
    others = [row.mean_loss or 0.0 for row in rows if not row.trainable]
    if trained and others and min(others) > max(trained):
        margin = 0.1 * (max(trained) - min(trained)) or 0.1
        axes.set_ylim(min(trained) - margin, max(trained) + margin)
        said = f"above: not trained, {min(others):.2f} to {max(others):.2f}"
        axes.text(0.02, 0.97, said, transform=axes.transAxes, va="top", fontsize="small")


def _points(
    axes: Any,
    methods: Sequence[str],
    rows: Sequence[Row],
    place: Callable[[Row], float],
    values_of: Callable[[Row], Sequence[float]],
) -> None:
    """One line for each of `methods`, whose place in them is its colour and marker in every panel."""
    for index, method in enumerate(methods):
        mine = sorted((row for row in rows if row.method == method and values_of(row)), key=place)
        if not mine:
            continue
        values = [values_of(row) for row in mine]
        means = [statistics.mean(each) for each in values]
        axes.errorbar(
            [place(row) for row in mine],
            means,
            yerr=(
                [mean - min(each) for mean, each in zip(means, values, strict=True)],
                [max(each) - mean for mean, each in zip(means, values, strict=True)],
            ),
            marker=MARKERS[index % len(MARKERS)],
            color=COLOURS[index % len(COLOURS)],
            linewidth=1,
            capsize=3,
            label=mine[0].title,
        )
