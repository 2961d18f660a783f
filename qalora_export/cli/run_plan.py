"""The plan of a run as a table: what runs, what it leaves on disk, memory and rough time; and what it really took."""

from __future__ import annotations

from rich.table import Table

from qalora_export.console import SafeConsole, results
from qalora_export.memory import bytes_text
from qalora_export.pipeline import RunPlan, RunReport


def print_plan(plan: RunPlan, to: SafeConsole) -> None:
    """One row per stage, the sums, and notes. to: `results` where the plan is what was asked for, else `console`."""
    found = plan.preflight
    table = Table("stage", "", title="plan", title_justify="left")
    for heading in ("disk", "memory", "about"):
        table.add_column(heading, justify="right")
    for stage in plan.stages:
        if stage.name in plan.done:
            table.add_row(stage.name, "up to date")
            continue
        forecast = found.stages[stage.name]
        memory = "" if forecast.memory is None else bytes_text(forecast.memory)
        table.add_row(stage.name, forecast.detail, bytes_text(forecast.disk), memory, duration(forecast.seconds))
    to.print(table)
    if found.stages:
        to.print(
            f"about {duration(found.seconds)} in all (rough); up to {bytes_text(found.needed)} of disk, "
            f"{bytes_text(found.machine.free)} free"
        )
    for note in found.notes:
        to.print(f"note: {note}")


def print_durations(plan: RunPlan, report: RunReport) -> None:
    """What the stages that ran took, beside what was expected."""
    if not report.seconds:
        return
    table = Table("stage", title="time", title_justify="left")
    for heading in ("took", "expected, about"):
        table.add_column(heading, justify="right")
    for name, seconds in report.seconds.items():
        table.add_row(name, duration(seconds), duration(plan.preflight.stages[name].seconds))
    results.print(table)


def duration(seconds: float) -> str:
    """Rough on purpose: seconds below two minutes, minutes below two hours, else hours."""
    if seconds < 120:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
