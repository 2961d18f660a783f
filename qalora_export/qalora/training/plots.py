"""The loss curve as PNG and SVG, drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qalora_export.safety import atomic_file

Curve = Sequence[tuple[int, float]]
FORMATS = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}  # no dates or versions in the files


def plot_losses(folder: Path, train: Curve, validation: Curve, *, best_step: int | None) -> list[Path]:
    """Write loss.png and loss.svg: loss per learned token (nats) over optimizer steps. Returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    with plt.rc_context({"svg.hashsalt": "qalora-export", "svg.fonttype": "none"}):
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        axes.plot(*_columns(train), color="0.65", linewidth=1, label="training")
        if validation:
            axes.plot(*_columns(validation), color="tab:blue", marker="o", markersize=3, label="validation")
        if best_step is not None:
            axes.axvline(best_step, color="tab:green", linestyle=":", label=f"kept: step {best_step}")
        axes.set(xlabel="optimizer step", ylabel="loss per answer token (nats)", ylim=(0, None))
        axes.grid(alpha=0.25)
        axes.legend()
        for kind, metadata in FORMATS.items():
            path = folder / f"loss.{kind}"
            with atomic_file(path, force=True) as temporary:
                figure.savefig(temporary, format=kind, dpi=140, metadata=metadata)
            written.append(path)
        plt.close(figure)
    return written


def _columns(curve: Curve) -> tuple[list[int], list[float]]:
    return [step for step, _ in curve], [value for _, value in curve]
