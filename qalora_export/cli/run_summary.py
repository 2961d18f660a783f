"""The last thing `run` prints: the same numbers on every runtime, the task score, where everything is."""

from __future__ import annotations

from pathlib import Path

from qalora_export.cli.parity_table import summary_table
from qalora_export.console import results
from qalora_export.evaluation import read_score
from qalora_export.recipe import Recipe
from qalora_export.verify.report.parity_report import read_report


def print_summary(recipe: Recipe) -> None:
    """Print the parity table, the task scores and the paths of a finished run."""
    out = Path(recipe.out)
    if (out / "report" / "report.json").is_file():
        results.print(summary_table(read_report(out / "report" / "report.json")))
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


def _score_line(out: Path) -> str:
    parts = []
    for label, name in (("base", "score.base.json"), ("fine-tuned", "score.merged.json")):
        if (out / name).is_file():
            score = read_score(out / name)
            parts.append(f"{label} {score['exact']}/{score['total']} ({score['accuracy']:.1%})")
    return "task score, exact match: " + (" → ".join(parts) or "not measured (no [evaluate] in the recipe)")
