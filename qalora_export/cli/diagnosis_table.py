"""What verify-parity found about a file of another tool, on the terminal: one sentence, then the table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from qalora_export.console import console, styled

if TYPE_CHECKING:
    from qalora_export.verify.foreign.report import Diagnosis

STYLES = {"ok": "green", "broken": "bold red", "not run": "bold yellow"}
COLOURS = {"nothing broken": "green", "broken": "bold red", "not known": "bold yellow"}
MOST_SHOWN = 6


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """The sentence, every part, what each step costs."""
    console.print(styled(f"[{COLOURS[diagnosis.verdict]}]{{}}[/]", diagnosis.sentence))
    table = Table("part", "", "what was found", title=f"{diagnosis.artifact} against {diagnosis.model}")
    table.title_justify = "left"
    for part in diagnosis.parts:
        lines = [part.sentence, *(f"· {finding}" for finding in part.findings[1:MOST_SHOWN])]
        lines += [f"· and {len(part.findings) - MOST_SHOWN} more"] if len(part.findings) > MOST_SHOWN else []
        lines += [f"tried: {part.proof}"] if part.proof else []
        table.add_row(
            styled("{}", part.title),
            styled(f"[{STYLES[part.state]}]{{}}[/]", part.state),
            styled("{}", "\n".join(lines)),
        )
    console.print(table)
    if diagnosis.figures:
        costs = Table(f"against {diagnosis.model} in float32", "KL, nats", "largest", "same first choice")
        for name, found in diagnosis.figures.items():
            costs.add_row(name, f"{found['kl']:.3g}", f"{found['kl_max']:.3g}", f"{100 * found['top1']:.1f} %")
        console.print(costs)
    console.print(styled("(exit code {}), {}", int(diagnosis.exit_code), diagnosis.out))
