"""What the logits gates G2, G3 and G4 say about positions."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from qalora_export.verify.metrics import ORDINARY, PositionMetrics
from qalora_export.verify.probes.probe_set import ProbeSet

WORST_SHOWN = 5
RULE = f"each position's divided by what float32 rounding alone makes of it over {ORDINARY:g}, where that is above 1"


def figures_of(measured: PositionMetrics) -> dict[str, Any]:
    """metrics.Summary, whose names the gates' limits use."""
    return asdict(measured.summary())


def worst_places(probes: ProbeSet, measured: PositionMetrics) -> tuple[str, ...]:
    """The positions with the largest error, worst first, with their NMSE, and scaled where a position is sensitive."""
    error = np.where(measured.bad, np.inf, measured.nmse / measured.sensitivity)
    order = np.argsort(-error, kind="stable")[:WORST_SHOWN]
    return tuple(f"{probes.place(int(i))} NMSE {_both(measured, int(i))}" for i in order)


def _both(measured: PositionMetrics, position: int) -> str:
    """What was measured and, where the bound is on another figure, that one."""
    if measured.bad[position]:
        return "inf"
    nmse, factor = measured.nmse[position], measured.sensitivity[position]
    return f"{nmse:.2e}" + (f" ({nmse / factor:.2e} scaled)" if factor > 1 else "")


def described(measured: PositionMetrics) -> str:
    """Every figure of a path in one line."""
    s = measured.summary()
    scaled = f" ({s.nmse_scaled_max:.2e} scaled: {RULE})" if (measured.sensitivity > 1).any() else ""
    return (
        f"{s.positions} positions: NMSE mean {s.nmse_mean:.2e} max {s.nmse_max:.2e}{scaled}, "
        f"KL mean {s.kl_mean:.2e} p99 {s.kl_p99:.2e} max {s.kl_max:.2e} nats, top-1 {100 * s.top1:.2f} %, "
        f"perplexity {s.perplexity_runtime:.4f} (reference {s.perplexity_reference:.4f})"
    )
