"""Gates G2 (exact path), G3 (shipped path) and G4 (decode) of one runtime, on every position of the probe set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import QaloraError, RuntimeUnavailableError
from qalora_export.verify.gates.rule import GATES, NOISE_GAIN, Entry, Limit, judge, not_run
from qalora_export.verify.metrics import PositionMetrics, compare, following_ids
from qalora_export.verify.runtimes.runs import Artifact, Mode, Runs

WORST_SHOWN = 5
Failure = QaloraError
Measured = PositionMetrics | Failure


@dataclass
class LogitsResult:
    """entries: G2, G3, G4 of one runtime. positions: per-position metrics by "exact", "shipped", "exact decode" …"""

    entries: list[Entry] = field(default_factory=list)
    positions: dict[str, PositionMetrics] = field(default_factory=dict)


@dataclass(frozen=True)
class Floor:
    """What noise the shipped path may have in one runtime. source: how it was found.

    figures, errors: of metrics.Summary's scattering figures and kl_max, and their standard errors. gain: how noisy the
    runtime's kernels are against simulated int8 rounding, and whether that was measured. measured_on_base: what the
    unadapted base shows in the runtime. metrics, base_metrics: simulation and base per position, for plots.
    """

    source: str
    figures: Mapping[str, float]
    errors: Mapping[str, float]
    gain: float = 1.0
    gain_measured: bool = False
    measured_on_base: Mapping[str, float] | None = None
    metrics: PositionMetrics | None = None
    base_metrics: PositionMetrics | None = None

    def bound(self, limit: Limit) -> float:
        """Largest passing value of a figure; "shipped_" before its name does not matter."""
        name = limit.figure.removeprefix("shipped_")
        return limit.bound * self.figures[name] + limit.errors * self.errors.get(name, 0.0)

    def as_json(self) -> dict[str, Any]:
        """For report.json."""
        return {
            "source": self.source,
            "figures": dict(self.figures),
            "standard_errors": dict(self.errors),
            "gain": self.gain,
            "gain_measured": self.gain_measured,
            "measured_on_base": dict(self.measured_on_base) if self.measured_on_base else None,
        }


def logits_gates(
    runtime: str,
    runs: Runs,
    reference: NDArray[np.float32],
    *,
    exact: Artifact | Failure,
    shipped: Artifact,
    floor: Floor | Failure,
    int8_nmse: NDArray[np.float64],
) -> LogitsResult:
    """Run the exact and the shipped path, whole prompts and token by token, and judge them.

    int8_nmse: (positions,), how sensitive each position is (metrics.PositionMetrics.scaled_by).
    exact, floor: a Failure says why that part could not be prepared; its gates are then "not run".
    """
    following = following_ids(runs.probes.ids, runs.probes.lengths)
    result = LogitsResult()
    exact_prefill, exact_decode = (
        measured if isinstance(measured, Failure) else measured.scaled_by(int8_nmse)
        for measured in _both_modes(runtime, runs, reference, following, exact, exact_path=True)
    )
    ship_prefill, ship_decode = _both_modes(runtime, runs, reference, following, shipped, exact_path=False)
    result.entries = [
        _exact_entry(runtime, runs, exact_prefill),
        _shipped_entry(runtime, runs, ship_prefill, floor),
        _decode_entry(runtime, runs, exact_decode, ship_decode, floor),
    ]
    named = {
        "exact": exact_prefill,
        "shipped": ship_prefill,
        "exact decode": exact_decode,
        "shipped decode": ship_decode,
    }
    result.positions = {name: value for name, value in named.items() if isinstance(value, PositionMetrics)}
    return result


def _both_modes(
    runtime: str,
    runs: Runs,
    reference: NDArray[np.float32],
    following: NDArray[np.int32],
    artifact: Artifact | Failure,
    *,
    exact_path: bool,
) -> tuple[Measured, Measured]:
    """(prefill against the reference, decode against the prefill or, on the shipped path, against the reference).

    Int8 kernels round differently for one token than for many, so the shipped path's decode is held to the same
    reference and bound as its prefill; the exact path has no such excuse and must agree with itself. Without a prefill
    there is nothing that decode could be equal to, so it is not run.
    """
    prefill = _run(runtime, runs, artifact, "prefill", exact_path)
    if isinstance(prefill, Failure):
        return prefill, prefill
    measured = compare(reference, prefill, following)
    decoded = _run(runtime, runs, artifact, "decode", exact_path)
    if isinstance(decoded, Failure):
        return measured, decoded
    against = prefill if exact_path and not measured.bad.any() else reference
    return measured, compare(against, decoded, following)


def _run(
    runtime: str, runs: Runs, artifact: Artifact | Failure, mode: Mode, exact_path: bool
) -> NDArray[np.float32] | Failure:
    if isinstance(artifact, Failure):
        return artifact
    try:
        return runs.logprobs(runtime, artifact, mode, exact=exact_path)
    except RuntimeUnavailableError as error:
        return error


def _exact_entry(runtime: str, runs: Runs, measured: Measured) -> Entry:
    if isinstance(measured, Failure):
        return not_run("G2", runtime, reason(measured))
    return judge(
        "G2",
        runtime,
        figures_of(measured),
        detail=_detail(measured),
        figures=figures_of(measured),
        where=worst_places(runs, measured),
    )


def _shipped_entry(runtime: str, runs: Runs, measured: Measured, floor: Floor | Failure) -> Entry:
    if isinstance(measured, Failure):
        return not_run("G3", runtime, reason(measured))
    figures = figures_of(measured)
    if isinstance(floor, Failure):
        return _without_floor("G3", runtime, figures, f"no noise floor: {reason(floor)}", worst_places(runs, measured))
    limits = [limit for limit in GATES["G3"].limits if limit.figure != NOISE_GAIN.figure or floor.gain_measured]
    return judge(
        "G3",
        runtime,
        figures | {NOISE_GAIN.figure: floor.gain},
        floor=floor.bound,
        limits=limits,
        where=worst_places(runs, measured),
        detail=f"{_detail(measured)}; noise floor: {floor.source}",
        figures=figures | {"floor": floor.as_json()},
    )


def _decode_entry(runtime: str, runs: Runs, exact: Measured, shipped: Measured, floor: Floor | Failure) -> Entry:
    figures: dict[str, Any] = {}
    limits: list[Limit] = []
    missing: list[str] = []
    if isinstance(exact, Failure):
        missing.append(f"exact path: {reason(exact)}")
    else:
        figures |= {f"exact_{key}": value for key, value in figures_of(exact).items()}
        limits += [limit for limit in GATES["G4"].limits if limit.figure.startswith("exact_")]
    if isinstance(shipped, Failure):
        missing.append(f"shipped path: {reason(shipped)}")
    else:
        figures |= {f"shipped_{key}": value for key, value in figures_of(shipped).items()}
        ship = [limit for limit in GATES["G4"].limits if limit.figure.startswith("shipped_")]
        limits += [limit for limit in ship if limit.kind == "absolute" or isinstance(floor, Floor)]
        missing += [f"no noise floor: {reason(floor)}"] if isinstance(floor, Failure) else []
    if not limits:
        return not_run("G4", runtime, "; ".join(missing))
    bound = floor.bound if isinstance(floor, Floor) else None
    where = [
        f"{path}: {place}"
        for path, measured in (("exact", exact), ("shipped", shipped))
        if isinstance(measured, PositionMetrics)
        for place in worst_places(runs, measured)
    ]
    entry = judge(
        "G4",
        runtime,
        figures,
        detail="; ".join(missing) or _decode_detail(figures),
        limits=limits,
        floor=bound,
        figures=figures,
        where=where,
    )
    return not_run("G4", runtime, entry.detail) if missing and entry.status == "pass" else entry


def _decode_detail(figures: dict[str, Any]) -> str:
    return (
        f"exact decode against exact prefill: NMSE max {figures['exact_nmse_max']:.2e}, "
        f"{figures['exact_disagreements']:.0f} other first choices; shipped decode against the reference: "
        f"KL mean {figures['shipped_kl_mean']:.2e}, top-1 {100 * figures['shipped_top1']:.2f} %"
    )


def _without_floor(gate: str, runtime: str, figures: dict[str, Any], reason: str, where: tuple[str, ...]) -> Entry:
    """Without a floor only the absolute limits can be judged: they can fail the gate, never pass it."""
    limits = [limit for limit in GATES[gate].limits if limit.figure != NOISE_GAIN.figure]
    absolute = [limit for limit in limits if limit.kind == "absolute"]
    entry = judge(gate, runtime, figures, detail=reason, limits=absolute, figures=figures, where=where)
    return entry if entry.status == "fail" else not_run(gate, runtime, reason)


def reason(error: Failure) -> str:
    """What stopped a part, without the path of a temporary file."""
    return "; ".join(part for part in (error.what, error.why, error.fix) if part)


def figures_of(measured: PositionMetrics) -> dict[str, Any]:
    """metrics.Summary, whose names the gates' limits use."""
    return asdict(measured.summary())


def worst_places(runs: Runs, measured: PositionMetrics) -> tuple[str, ...]:
    """The positions with the largest error, worst first, with their NMSE (scaled where a position is sensitive)."""
    error = np.where(measured.bad, np.inf, measured.nmse / measured.sensitivity)
    order = np.argsort(-error, kind="stable")[:WORST_SHOWN]
    return tuple(f"{runs.probes.place(int(i))} NMSE {error[i]:.2e}" for i in order)


def _detail(measured: PositionMetrics) -> str:
    s = measured.summary()
    return (
        f"{s.positions} positions: NMSE mean {s.nmse_mean:.2e} max {s.nmse_max:.2e}, "
        f"KL mean {s.kl_mean:.2e} p99 {s.kl_p99:.2e} max {s.kl_max:.2e} nats, top-1 {100 * s.top1:.2f} %, "
        f"perplexity {s.perplexity_runtime:.4f} (reference {s.perplexity_reference:.4f})"
    )
