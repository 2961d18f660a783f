"""What a gate is, and the one rule that turns its measurements into pass, fail or not run.

A gate passes only when every one of its checks was measured and lies within its bound; NaN lies within no bound. A
gate that could not be measured is "not run", which is never a pass: it makes the whole run exit with code 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from qalora_export.errors import ExitCode

Status = Literal["pass", "fail", "not run"]


@dataclass(frozen=True, slots=True)
class Limit:
    """One figure's bound, the largest passing value, and why it is where it is.

    raw: for a figure that is scaled before it is held against its bound, the figure as it was measured; rule: how.
    """

    figure: str
    bound: float
    unit: str
    reason: str
    raw: str = ""
    rule: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """One measured figure against its bound.

    raw: the figure before it was scaled by `rule`; None where nothing is scaled.
    """

    figure: str
    measured: float
    bound: float
    unit: str
    reason: str
    raw: float | None = None
    rule: str = ""

    @property
    def passed(self) -> bool:
        return self.measured <= self.bound  # False for NaN on either side


@dataclass(frozen=True, slots=True)
class Entry:
    """One gate of one runtime. where: tensors, files or positions that the finding points at.

    seconds: from this gate's begin to its end; what several gates look at is in those of the first.
    """

    gate: str
    runtime: str
    status: Status
    detail: str
    checks: tuple[Check, ...] = ()
    where: tuple[str, ...] = ()
    figures: Mapping[str, Any] | None = None
    seconds: float = 0.0

    @property
    def deciding(self) -> Check | None:
        """The first check that failed, else the first."""
        failed = [check for check in self.checks if not check.passed]
        return next(iter(failed or self.checks), None)

    def with_check(self, check: Check, where: Iterable[str] = ()) -> Entry:
        """The same entry with one more check, which may turn a pass into a fail; `where` goes in front."""
        status: Status = self.status if check.passed else "fail"  # what was not run stays so, or fails
        return replace(self, status=status, checks=(*self.checks, check), where=(*where, *self.where))


@dataclass(frozen=True, slots=True)
class Gate:
    """id, title: as in the report. what: the two things it compares. row: what its headline figure, that of the first
    limit, means to a reader of `run`'s summary. limits: every bound with its reason.
    """

    id: str
    title: str
    what: str
    row: str
    limits: tuple[Limit, ...]

    def __post_init__(self) -> None:
        if not all((self.id, self.title, self.what, self.row, self.limits)):
            raise ValueError(f"gate {self.id!r} lacks a title, what it compares, a row for the summary, or limits")
        if not all(limit.unit and limit.reason for limit in self.limits):
            raise ValueError(f"gate {self.id} has a bound without a unit or a reason")

    def limit(self, figure: str) -> Limit:
        return next(limit for limit in self.limits if limit.figure == figure)

    def judge(
        self,
        runtime: str,
        measured: Mapping[str, float],
        *,
        detail: str,
        where: Iterable[str] = (),
        limits: Iterable[Limit] | None = None,
        figures: Mapping[str, Any] | None = None,
    ) -> Entry:
        """Turn measurements into an entry. Every limit needs its figure: a missing one raises KeyError.

        limits: those that can be judged, of all that the gate has. figures: what else the report says about them.
        """
        checks = tuple(checked(limit, measured) for limit in (self.limits if limits is None else limits))
        if not checks:
            raise ValueError(f"gate {self.id} has nothing to check")
        status: Status = "pass" if all(check.passed for check in checks) else "fail"
        return Entry(self.id, runtime, status, detail, checks, tuple(where), figures)

    def not_run(self, runtime: str, reason: str) -> Entry:
        """An entry for a gate that could not be measured, and why."""
        return Entry(self.id, runtime, "not run", reason)


def checked(limit: Limit, measured: Mapping[str, float]) -> Check:
    """A limit against its figure."""
    figure, raw = float(measured[limit.figure]), float(measured[limit.raw]) if limit.raw else None
    return Check(limit.figure, figure, float(limit.bound), limit.unit, limit.reason, raw, limit.rule)


def exit_code(entries: Iterable[Entry]) -> ExitCode:
    """1 when any gate failed, else 3 when any was not run, else 0. No entries at all is not a pass."""
    statuses = [entry.status for entry in entries]
    if "fail" in statuses:
        return ExitCode.PARITY_FAILED
    if "not run" in statuses or not statuses:
        return ExitCode.RUNTIME_UNAVAILABLE
    return ExitCode.OK
