"""Gate G4: token by token on the KV cache a runtime computes what it computes for the whole prompt at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from qalora_export.errors import RuntimeUnavailableError
from qalora_export.verify.gates.g2_exact_path import NMSE, NO_BAD, TOP1
from qalora_export.verify.gates.g3_shipped_path import COST, PROOF, cost_figures, cost_limits, findings, proof_figures
from qalora_export.verify.gates.positions import worst_places
from qalora_export.verify.gates.registry import measures
from qalora_export.verify.rule import Entry, Gate, Limit
from qalora_export.verify.target import RunPath, Target

V = TypeVar("V")


def _on(path: RunPath, *limits: Limit) -> tuple[Limit, ...]:
    """The same limits, with the same reasons, on the figures of one path."""
    return tuple(
        replace(limit, figure=f"{path}_{limit.figure}", raw=f"{path}_{limit.raw}" if limit.raw else "")
        for limit in limits
    )


EXACT, SHIPPED = _on("exact", NMSE, TOP1, NO_BAD), _on("shipped", *PROOF, NO_BAD, *COST)

GATE = Gate(
    id="G4",
    title="decode",
    what="logits token by token with the KV cache against logits of the whole prompt; every layer as in G3",
    row="KV-cache decode, largest NMSE",
    limits=(*EXACT, *SHIPPED),
)


@dataclass
class _Parts:
    """What could be measured of the two paths, what can be judged of it, and what is missing."""

    figures: dict[str, Any] = field(default_factory=dict)
    limits: list[Limit] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def take(self, name: str, step: Callable[[], V]) -> V | None:
        try:
            return step()
        except RuntimeUnavailableError as error:
            self.missing.append(f"{name}: {error.reason}")
            return None


@measures(GATE)
def decode(target: Target) -> Entry:
    parts = _Parts()
    exact = _path(target, parts, "exact", EXACT)
    shipped = _path(target, parts, "shipped", _on("shipped", NO_BAD, *cost_limits(target)))
    proven = shipped and _proof(target, parts)
    if not parts.limits:
        return GATE.not_run(target.name, "; ".join(parts.missing))
    entry = GATE.judge(
        target.name,
        parts.figures,
        detail="; ".join(parts.missing) or _detail(parts.figures),
        limits=parts.limits,
        figures=parts.figures,
        where=parts.where,
    )
    complete = exact and shipped and proven
    return entry if complete or entry.status == "fail" else GATE.not_run(target.name, entry.detail)


def _path(target: Target, parts: _Parts, path: RunPath, limits: tuple[Limit, ...]) -> bool:
    measured = parts.take(f"{path} path", lambda: target.decode(path))
    if measured is None:
        return False
    parts.figures |= {f"{path}_{name}": value for name, value in cost_figures(measured).items()}
    parts.limits += limits
    parts.where += [f"{path}: {place}" for place in worst_places(target.session.probes, measured)]
    return True


def _proof(target: Target, parts: _Parts) -> bool:
    """Every layer of the shipped path, a token at a time."""
    local = parts.take("layer by layer", lambda: target.local("decode"))
    if local is None:
        return False
    parts.figures |= {f"shipped_{name}": value for name, value in proof_figures(local).items()}
    parts.limits += _on("shipped", *PROOF)
    parts.where[:0] = findings(local.proof)
    return True


def _detail(figures: dict[str, Any]) -> str:
    return (
        f"exact decode against exact prefill: NMSE max {figures['exact_nmse_max']:.2e}, "
        f"{figures['exact_disagreements']:.0f} other first choices; shipped decode against the reference: "
        f"KL mean {figures['shipped_kl_mean']:.2e}, top-1 {100 * figures['shipped_top1']:.2f} %"
    )
