"""`qalora-export doctor`"""

from __future__ import annotations

import typer

from qalora_export.console import results, styled

STYLES = {"ok": "green", "missing": "bold red", "note": "yellow"}


def command() -> None:
    """Which runtimes, CPU features and GPU are there, what is missing and how to get it.

    Exit code 3 when something that a stage or a runtime of verify-parity needs is missing.

    [bold]Examples[/bold]

      qalora-export doctor
    """
    from rich.table import Table

    from qalora_export.inspection.doctor import examine

    findings = examine()
    table = Table("what", "status", "detail")
    for finding in findings:
        table.add_row(finding.subject, styled(f"[{STYLES[finding.status]}]{{}}[/]", finding.status), finding.detail)
    results.print(table)
    missing = [finding.subject for finding in findings if finding.status == "missing"]
    if missing:
        results.print(styled("[bold red]missing[/bold red]: {}", ", ".join(missing)))
        raise typer.Exit(3)
