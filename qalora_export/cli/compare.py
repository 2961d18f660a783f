"""`qalora-export compare RECIPE`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qalora_export.console import console

if TYPE_CHECKING:
    from qalora_export.comparison.stage import ComparisonReport

QUICK = {
    "compare.seeds": [0],
    "compare.learning_rates": [4e-3],
    "compare.bits": [4],
    "compare.prove": False,
    "compare.speed": False,
}


def command(
    recipe: Annotated[
        Path, typer.Argument(help="Recipe (TOML) with \\[train], \\[quantize], \\[evaluate] and \\[compare].")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for cells, table and plot; default: the recipe's.")] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="4 bits, one seed and learning rate, no variants, nothing proven or timed: a first look."
        ),
    ] = False,
    method: Annotated[list[str] | None, typer.Option(help="Only this method; may be repeated.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Measure every cell anew.")] = False,
) -> None:
    """QA-LoRA beside the methods it is compared with, on the same base, data, steps and seeds.

    Each trained method takes its own best learning rate, chosen by validation loss. Every model that is deployed as
    GGUF and ONNX is exported and proven. A killed comparison goes on where it was.

    [bold]Examples[/bold]

      qalora-export compare samples/compare/recipe.toml --out build/compare --quick

      qalora-export compare samples/compare/recipe.toml --method qa-lora --method qlora+gptq
    """
    from qalora_export.comparison.stage import compare
    from qalora_export.recipe_file import load_recipe

    overrides: dict[str, Any] = dict(QUICK) | {"compare.methods": quick_methods()} if quick else {}
    if out is not None:
        overrides["out"] = str(out.absolute())
    if method:
        overrides["compare.methods"] = method
    report = compare(load_recipe(recipe, overrides), force=force)
    _show(report)
    for name in ("comparison.md", "comparison.png"):
        console.print(str(Path(report.out) / name), markup=False, highlight=False)


def quick_methods() -> list[str]:
    """Without LQ-LoRA and those that only vary another one's start, bits or groups: each trains another model."""
    from qalora_export.comparison.methods import METHODS

    return [name for name, method in METHODS.items() if name not in ("lq-lora", "qa-lora-coarse") and not method.varies]


def _show(report: ComparisonReport) -> None:
    from rich.table import Table

    from qalora_export.comparison.table import cells_of

    table = Table(title=f"{report.made} cells measured now, {report.kept} kept from before")
    for heading in ("method", "bits/weight", "held-out text", "answers", "score", "decode", "parity"):
        table.add_column(heading, justify="left" if heading in ("method", "parity") else "right")
    for row in report.rows:
        title, bits, text, loss, score, _, decode, *_, parity = cells_of(row)
        table.add_row(title, bits, text, loss, score, decode, parity)
    console.print(table)
    for claim in report.claims:
        console.print(f"{claim.verdict:>12}  {claim.text} ({claim.figure})")
