"""The last thing `run` prints: the same numbers on every runtime, the task score, where everything is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from qalora_export.console import results
from qalora_export.recipe import Recipe
from qalora_export.safety import read_json

STYLES = {"pass": "green", "fail": "bold red", "not run": "bold yellow"}
# Column title -> gate and figure, as named in report.json.
COLUMNS = {
    "bytes": ("G0", "differing_values"),
    "weights, ulp": ("G1", "ulp_max"),
    "exact path, NMSE": ("G2", "nmse_max"),
    "shipped path, KL": ("G3", "kl_mean"),
    "KV decode, NMSE": ("G4", "exact_nmse_max"),
    "text, ids": ("G5", "differing_ids"),
}


def print_summary(recipe: Recipe) -> None:
    """Print the parity table, the task scores and the paths of a finished run."""
    out = Path(recipe.out)
    if (out / "report" / "report.json").is_file():
        results.print(_parity_table(read_json(out / "report" / "report.json")))
    results.print(_score_line(out), markup=True)
    artifacts = ("model.gguf", "onnx", "merged.qalora", "adapter", "report/report.html", "report/report.json")
    for name in artifacts:
        if (out / name).exists():
            results.print(f"  {out / name}", markup=False)


def _parity_table(report: dict[str, Any]) -> Table:
    table = Table(
        "runtime", *COLUMNS, "verdict", title="one INT4 model, the same numbers as PyTorch", title_justify="left"
    )
    for runtime in dict.fromkeys(entry["runtime"] for entry in report["gates"]):
        entries = {entry["gate"]: entry for entry in report["gates"] if entry["runtime"] == runtime}
        statuses = {entry["status"] for entry in entries.values()}
        worst = next(status for status in ("fail", "not run", "pass") if status in statuses)
        cells = [_cell(entries.get(gate), figure) for gate, figure in COLUMNS.values()]
        table.add_row(runtime, *cells, f"[{STYLES[worst]}]{worst}[/]")
    return table


def _cell(entry: dict[str, Any] | None, figure: str) -> str:
    if entry is None:
        return "–"
    for check in entry["checks"]:
        if check["figure"] == figure:
            value = check["measured"]
            text = f"{value:.3g}" if isinstance(value, float) and value % 1 else str(value)
            return f"[{STYLES[entry['status']]}]{text}[/]"
    return f"[{STYLES[entry['status']]}]{entry['status']}[/]"


def _score_line(out: Path) -> str:
    parts = []
    for label, name in (("base", "score.base.json"), ("fine-tuned", "score.merged.json")):
        if (out / name).is_file():
            score = read_json(out / name)
            parts.append(f"{label} {score['exact']}/{score['total']} ({score['accuracy']:.1%})")
    return "task score, exact match: " + (" → ".join(parts) or "not measured (no \\[evaluate] in the recipe)")
