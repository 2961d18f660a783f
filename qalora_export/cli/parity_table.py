"""What verify-parity found, on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from qalora_export.console import console, styled

if TYPE_CHECKING:
    from qalora_export.verify.gates.rule import Entry
    from qalora_export.verify.report.parity_report import ParityReport

STYLES = {"pass": "green", "fail": "bold red", "not run": "bold yellow"}


def print_report(report: ParityReport) -> None:
    """Gates down, runtimes across; then every finding, the verdict and what to look at."""
    from qalora_export.verify.gates.rule import GATES
    from qalora_export.verify.report.parity_report import explain

    runtimes = list(dict.fromkeys(entry.runtime for entry in report.entries))
    by_place = {(entry.gate, entry.runtime): entry for entry in report.entries}
    table = Table("gate", *runtimes, title="verify-parity", title_justify="left", header_style="bold")
    for gate in GATES.values():
        cells = [_cell(by_place[gate.id, runtime]) for runtime in runtimes]
        table.add_row(styled("{}\n   [dim]{}[/dim]", f"{gate.id} {gate.title}", gate.limits[0].unit), *cells)
    console.print(table)
    for entry in report.entries:
        if entry.status != "pass":
            title = f"{entry.gate} {entry.runtime}: {entry.status}"
            console.print(styled(f"[{STYLES[entry.status]}]{{}}[/]  {{}}", title, explain(entry)))
            for place in entry.where:
                console.print(f"    {place}")
    ending = f"(exit code {int(report.exit_code)}), {report.out}"
    console.print(styled(f"[{STYLES[report.verdict]}]verdict: {{}}[/] {{}}", report.verdict, ending))


def _cell(entry: Entry) -> Text:
    from qalora_export.verify.report.parity_report import number

    style, check = STYLES[entry.status], entry.deciding
    sign = "≤" if entry.status == "pass" else ">"
    unit = "" if not check or entry.status == "pass" else f"\n{check.unit}"
    figures = f"\n{number(check.measured)} {sign} {number(check.bound)}{unit}" if check else ""
    return styled(f"[{style}]{{}}[/][dim]{{}}[/dim]", entry.status, figures)
