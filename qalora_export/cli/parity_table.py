"""What verify-parity found, on the terminal: the table with every finding, and the summary at the end of `run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from qalora_export.console import console, styled

if TYPE_CHECKING:
    from qalora_export.verify.report.costs import Cost
    from qalora_export.verify.report.parity_report import ParityReport
    from qalora_export.verify.rule import Entry

STYLES = {"pass": "green", "fail": "bold red", "not run": "bold yellow"}


def print_report(report: ParityReport) -> None:
    """What each step costs; gates down, runtimes across; then every finding, the verdict and what to look at."""
    from qalora_export.verify.gates.registry import all_gates
    from qalora_export.verify.report.parity_report import explain, rules_of

    console.print(cost_table(report.costs))
    if task := report.facts["task"]:
        console.print(styled("[dim]task score: {}[/dim]", task))
    for cost in report.costs:
        if cost.note:
            console.print(styled("[dim]{}: {}[/dim]", cost.model, cost.note))
    runtimes = list(dict.fromkeys(entry.runtime for entry in report.entries))
    by_place = {(entry.gate, entry.runtime): entry for entry in report.entries}
    table = Table("gate", *runtimes, title="verify-parity", title_justify="left", header_style="bold")
    for gate in all_gates().values():
        cells = [_cell(by_place[gate.id, runtime]) for runtime in runtimes]
        table.add_row(styled("{}\n   [dim]{}[/dim]", f"{gate.id} {gate.title}", gate.limits[0].unit), *cells)
    console.print(table)
    for rule in rules_of(report.entries):
        console.print(styled("[dim]{}[/dim]", rule))
    for entry in report.entries:
        if entry.status != "pass":
            title = f"{entry.gate} {entry.runtime}: {entry.status}"
            console.print(styled(f"[{STYLES[entry.status]}]{{}}[/]  {{}}", title, explain(entry)))
            for place in entry.where:
                console.print(f"    {place}")
    if device := report.facts.get("device"):
        console.print(styled("answered on {}; the files were read (G0) and dequantized (G1) here", device["words"]))
    for artifact in report.facts["artifacts"]:
        if note := artifact["context"]["note"]:
            console.print(f"note: {artifact['name']}: {note}")
    ending = f"(exit code {int(report.exit_code)}), {report.out}"
    gaps = "".join(f"; not checked: {gap}" for gap in report.facts["not_checked"])
    console.print(styled(f"[{STYLES[report.verdict]}]verdict: {{}}[/] {{}}{{}}", report.verdict, ending, gaps))


def cost_table(costs: Sequence[Cost]) -> Table:
    """From the original model to what ships; what is not at hand says so."""
    from qalora_export.verify.report.parity_report import NOT_AT_HAND, nats, share

    reference = costs[-1].against if costs else ""
    title = f"what it costs, in nats: each model against the one above, each path against {reference}"
    table = Table("model", title=title, title_justify="left", header_style="bold")
    for heading in ("KL", "top-1", "loss on text", "task score"):
        table.add_column(heading, justify="right")
    for cost in costs:
        change = [nats(cost.kl), share(cost.top1)] if cost.against else ["", ""]
        score = f"{cost.score.exact}/{cost.score.total}" if cost.score else NOT_AT_HAND
        table.add_row(*map(Text, (cost.model, *change, nats(cost.loss), score)))
    return table


def _cell(entry: Entry) -> Text:
    from qalora_export.verify.report.parity_report import measured_text, number

    style, check = STYLES[entry.status], entry.deciding
    sign = "≤" if entry.status == "pass" else ">"
    unit = "" if not check or entry.status == "pass" else f"\n{check.unit}"
    figures = f"\n{measured_text(check)} {sign} {number(check.bound)}{unit}" if check else ""
    return styled(f"[{style}]{{}}[/][dim]{{}}[/dim]", entry.status, figures)


def summary_table(report: Mapping[str, Any]) -> Table:
    """The headline figure of every gate in a parsed report.json, runtimes across: the same numbers everywhere."""
    runtimes = list(dict.fromkeys(entry["runtime"] for entry in report["gates"]))
    rows = dict.fromkeys((entry["gate"], entry["row"]) for entry in report["gates"])
    entries = {(entry["gate"], entry["runtime"]): entry for entry in report["gates"]}
    table = Table(
        "against PyTorch float32",
        *runtimes,
        title="one fine-tuned INT4 model, the same numbers everywhere",
        title_justify="left",
    )
    for gate, row in rows:
        table.add_row(row, *(_headline(entries.get((gate, runtime))) for runtime in runtimes))
    table.add_row("verdict", *(_verdict(report["gates"], runtime) for runtime in runtimes), style="bold")
    return table


def _headline(entry: Mapping[str, Any] | None) -> Text:
    """The headline figure, and the one that failed where that is another."""
    if entry is None or entry["status"] == "not run":
        return _in_style("not run", "not run")
    text, raw = _figure(entry["headline"]), entry.get("headline_raw")
    if raw is not None and raw != entry["headline"]:
        text = f"{_figure(raw)}, scaled {text}"
    if entry["status"] == "fail" and entry["measured"] != entry["headline"]:
        text += f", {entry['figure']} {_figure(entry['measured'])}"
    return _in_style(entry["status"], text)


def _figure(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else str(value)  # non-finite numbers are strings in JSON


def _verdict(entries: list[Mapping[str, Any]], runtime: str) -> Text:
    statuses = {entry["status"] for entry in entries if entry["runtime"] == runtime}
    worst = next(status for status in ("fail", "not run", "pass") if status in statuses)
    return _in_style(worst, worst)


def _in_style(status: str, text: str) -> Text:
    return styled(f"[{STYLES[status]}]{{}}[/]", text)
