"""The last thing `run` prints: the same numbers on every runtime, the task score, where everything is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from qalora_export.console import results, styled
from qalora_export.recipe import Recipe
from qalora_export.safety import read_json

STYLES = {"pass": "green", "fail": "bold red", "not run": "bold yellow"}
# Gate in report.json -> what its headline figure means to a reader.
ROWS = {
    "G0": "values that differ in the file",
    "G1": "weights, largest ulp",
    "G2": "exact path, largest NMSE",
    "G3": "shipped path, mean KL in nats",
    "G4": "KV-cache decode, largest NMSE",
    "G5": "token ids that differ",
}


def print_summary(recipe: Recipe) -> None:
    """Print the parity table, the task scores and the paths of a finished run."""
    out = Path(recipe.out)
    if (out / "report" / "report.json").is_file():
        results.print(_parity_table(read_json(out / "report" / "report.json")))
    results.print(_score_line(out))
    artifacts = (
        "model.gguf",
        "onnx",
        "merged.qalora",
        "adapter",
        "README.md",
        "report/report.html",
        "report/report.json",
    )
    for name in artifacts:
        if (out / name).exists():
            results.print(f"  {out / name}")


def _parity_table(report: dict[str, Any]) -> Table:
    runtimes = list(dict.fromkeys(entry["runtime"] for entry in report["gates"]))
    entries = {(entry["gate"], entry["runtime"]): entry for entry in report["gates"]}
    table = Table(
        "against PyTorch float32",
        *runtimes,
        title="one fine-tuned INT4 model, the same numbers everywhere",
        title_justify="left",
    )
    for gate, title in ROWS.items():
        table.add_row(title, *(_cell(entries.get((gate, runtime))) for runtime in runtimes))
    verdicts = [_verdict([e for (_, name), e in entries.items() if name == runtime]) for runtime in runtimes]
    table.add_row("verdict", *verdicts, style="bold")
    return table


def _cell(entry: dict[str, Any] | None) -> Text:
    if entry is None or entry["measured"] is None:
        return _in_style("not run", "not run")
    measured = entry["measured"]  # non-finite numbers are strings in report.json
    text = measured if isinstance(measured, str) else f"{measured:.3g}"
    return _in_style(entry["status"], text)


def _verdict(entries: list[dict[str, Any]]) -> Text:
    statuses = {entry["status"] for entry in entries}
    worst = next(status for status in ("fail", "not run", "pass") if status in statuses)
    return _in_style(worst, worst)


def _in_style(status: str, text: str) -> Text:
    return styled(f"[{STYLES[status]}]{{}}[/]", text)


def _score_line(out: Path) -> str:
    parts = []
    for label, name in (("base", "score.base.json"), ("fine-tuned", "score.merged.json")):
        if (out / name).is_file():
            score = read_json(out / name)
            parts.append(f"{label} {score['exact']}/{score['total']} ({score['accuracy']:.1%})")
    return "task score, exact match: " + (" → ".join(parts) or "not measured (no [evaluate] in the recipe)")
