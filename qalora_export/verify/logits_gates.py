"""Gates G2 (exact path), G3 (shipped path) and G4 (decode) of one runtime, on every position of the probe set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import QaloraError, RuntimeUnavailableError
from qalora_export.verify.gates import GATES, Entry, Limit, judge, not_run
from qalora_export.verify.metrics import PositionMetrics, compare, following_ids
from qalora_export.verify.runs import Artifact, Mode, Runs

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
    """Noise floor of one runtime. source: what it was measured on; figures as in metrics.Summary."""

    source: str
    figures: Mapping[str, float]
    metrics: PositionMetrics | None = None


def logits_gates(runtime: str, runs: Runs, reference: NDArray[np.float32], *, exact: Artifact | Failure,
                 shipped: Artifact, floor: Floor | Failure) -> LogitsResult:  # fmt: skip
    """Run the exact and the shipped path, whole prompts and token by token, and judge them.

    exact, floor: a Failure says why that part could not be prepared; its gates are then "not run".
    """
    following = following_ids(runs.probes.ids, runs.probes.lengths)
    result = LogitsResult()
    exact_prefill, exact_decode = _both_modes(runtime, runs, reference, following, exact, exact_path=True)
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


def _both_modes(runtime: str, runs: Runs, reference: NDArray[np.float32], following: NDArray[np.int32],
                artifact: Artifact | Failure, *, exact_path: bool) -> tuple[Measured, Measured]:  # fmt: skip
    """(prefill against the reference, decode against …): the exact path's own prefill, or the reference when shipped.

    Int8 kernels round differently for one token than for many, so the shipped path's decode is held to the same
    reference and bound as its prefill; the exact path has no such excuse and must agree with itself.
    """
    prefill = _run(runtime, runs, artifact, "prefill", exact_path)
    if isinstance(prefill, Failure):
        return prefill, prefill if isinstance(artifact, Failure) else _run_compared(
            runtime, runs, artifact, exact_path, reference, following
        )
    measured = compare(reference, prefill, following)
    against = prefill if exact_path and not measured.bad.any() else reference
    return measured, _run_compared(runtime, runs, artifact, exact_path, against, following)


def _run_compared(runtime: str, runs: Runs, artifact: Artifact | Failure, exact_path: bool,
                  against: NDArray[np.float32], following: NDArray[np.int32]) -> Measured:  # fmt: skip
    decoded = _run(runtime, runs, artifact, "decode", exact_path)
    return decoded if isinstance(decoded, Failure) else compare(against, decoded, following)


def _run(runtime: str, runs: Runs, artifact: Artifact | Failure, mode: Mode,
         exact_path: bool) -> NDArray[np.float32] | Failure:  # fmt: skip
    if isinstance(artifact, Failure):
        return artifact
    try:
        return runs.logprobs(runtime, artifact, mode, exact=exact_path)
    except RuntimeUnavailableError as error:
        return error


def _exact_entry(runtime: str, runs: Runs, measured: Measured) -> Entry:
    if isinstance(measured, Failure):
        return not_run("G2", runtime, str(measured))
    return judge("G2", runtime, figures_of(measured), detail=_detail(measured), figures=figures_of(measured),
                 where=worst_places(runs, measured))  # fmt: skip


def _shipped_entry(runtime: str, runs: Runs, measured: Measured, floor: Floor | Failure) -> Entry:
    if isinstance(measured, Failure):
        return not_run("G3", runtime, str(measured))
    figures = figures_of(measured)
    if isinstance(floor, Failure):
        return _without_floor("G3", runtime, figures, f"no noise floor: {floor}", worst_places(runs, measured))
    return judge("G3", runtime, figures, floor=floor.figures, where=worst_places(runs, measured),
                 detail=f"{_detail(measured)}; noise floor: {floor.source}",
                 figures=figures | {"floor": dict(floor.figures), "floor_source": floor.source})  # fmt: skip


def _decode_entry(runtime: str, runs: Runs, exact: Measured, shipped: Measured, floor: Floor | Failure) -> Entry:
    figures: dict[str, Any] = {}
    limits: list[Limit] = []
    missing: list[str] = []
    if isinstance(exact, Failure):
        missing.append(f"exact path: {exact}")
    else:
        figures |= {f"exact_{key}": value for key, value in figures_of(exact).items()}
        limits += [limit for limit in GATES["G4"].limits if limit.figure.startswith("exact_")]
    if isinstance(shipped, Failure):
        missing.append(f"shipped path: {shipped}")
    else:
        figures |= {f"shipped_{key}": value for key, value in figures_of(shipped).items()}
        ship = [limit for limit in GATES["G4"].limits if limit.figure.startswith("shipped_")]
        limits += [limit for limit in ship if limit.kind == "absolute" or isinstance(floor, Floor)]
        missing += [f"no noise floor: {floor}"] if isinstance(floor, Failure) else []
    if not limits:
        return not_run("G4", runtime, "; ".join(missing))
    floors = {f"shipped_{k}": v for k, v in floor.figures.items()} if isinstance(floor, Floor) else None
    measured = exact if not isinstance(exact, Failure) else shipped
    where = worst_places(runs, measured) if isinstance(measured, PositionMetrics) else ()
    entry = judge("G4", runtime, figures, detail="; ".join(missing) or "prefill and decode agree at every position",
                  limits=limits, floor=floors, figures=figures, where=where)  # fmt: skip
    return not_run("G4", runtime, entry.detail) if missing and entry.status == "pass" else entry


def _without_floor(gate: str, runtime: str, figures: dict[str, Any], reason: str, where: tuple[str, ...]) -> Entry:
    """Without a floor only the absolute limits can be judged: they can fail the gate, never pass it."""
    absolute = [limit for limit in GATES[gate].limits if limit.kind == "absolute"]
    entry = judge(gate, runtime, figures, detail=reason, limits=absolute, figures=figures, where=where)
    return entry if entry.status == "fail" else not_run(gate, runtime, reason)


def figures_of(measured: PositionMetrics) -> dict[str, Any]:
    """metrics.Summary under the names that gates' limits use."""
    values = asdict(measured.summary())
    values["bad_positions"] = values.pop("bad")
    return values


def worst_places(runs: Runs, measured: PositionMetrics) -> tuple[str, ...]:
    """The positions with the largest error, worst first, with their NMSE."""
    error = np.where(measured.bad, np.inf, measured.nmse)
    order = np.argsort(-error, kind="stable")[:WORST_SHOWN]
    return tuple(f"{runs.probes.place(int(i))} NMSE {error[i]:.2e}" for i in order)


def _detail(measured: PositionMetrics) -> str:
    s = measured.summary()
    return (f"{s.positions} positions: NMSE mean {s.nmse_mean:.2e} max {s.nmse_max:.2e}, "
            f"KL mean {s.kl_mean:.2e} p99 {s.kl_p99:.2e} max {s.kl_max:.2e} nats, top-1 {100 * s.top1:.2f} %, "
            f"perplexity {s.perplexity_runtime:.4f} (reference {s.perplexity_reference:.4f})")  # fmt: skip
