"""Held-out loss against bits per weight as deployed, one point per row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qalora_export.comparison.table import Row
from qalora_export.safety import atomic_file


def plot_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write the plot as PNG. A method of several widths is a line; whiskers are the range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    shown = [row for row in rows if row.mean_loss is not None]
    for index, method in enumerate(dict.fromkeys(row.method for row in shown)):
        mine = sorted((row for row in shown if row.method == method), key=lambda row: row.bits_per_weight)
        mean = [row.mean_loss or 0.0 for row in mine]
        low = [m - min(row.judged) for m, row in zip(mean, mine, strict=True)]
        high = [max(row.judged) - m for m, row in zip(mean, mine, strict=True)]
        axes.errorbar(
            [row.bits_per_weight for row in mine],
            mean,
            yerr=(low, high),
            marker="osD^vPX*<>"[index % 10],
            linewidth=1,
            capsize=3,
            label=mine[0].title,
        )
    axes.set_xscale("log", base=2)
    ticks = [2, 3, 4, 6, 8, 16]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    what = "text" if any(row.text for row in shown) else "answers"
    axes.set(xlabel="bits per weight as deployed", ylabel=f"loss of held-out {what}, nats per token")
    axes.grid(alpha=0.25)
    axes.legend(fontsize="small")
    with atomic_file(path, force=True) as temporary:
        figure.savefig(temporary, format="png", dpi=140, metadata={"Software": None})
    plt.close(figure)
