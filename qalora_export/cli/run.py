"""`qalora-export run recipe.toml`"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from qalora_export.console import console, next_command, results
from qalora_export.errors import InputError


def command(
    recipe: Annotated[Path, typer.Argument(help="TOML file; see samples/devices/recipe.toml.")],
    out: Annotated[Path | None, typer.Option(help="Where the artifacts go; beats the recipe's `out`.")] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Beat one recipe key, e.g. train.rank=8.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every input, print the plan, stop.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Run every stage again and replace its output.")] = False,
) -> None:
    """Quantize, train, merge, export and verify from one recipe file.

    Every input of every stage is checked before the first one starts; all findings are told together, else the plan:
    disk, memory, rough time. A hub model that is not in the cache is fetched for it. Stages whose inputs, settings and
    code are unchanged are skipped; a killed run goes on where it stopped. The resolved recipe is saved beside the
    outputs.

    [bold]Examples[/bold]

      qalora-export run samples/devices/recipe.toml --out build/demo

      qalora-export run recipe.toml --dry-run

      qalora-export run recipe.toml --set quantize.bits=3 --set train.epochs=1 --out build/three-bit
    """
    from qalora_export.cli.run_plan import print_durations, print_plan
    from qalora_export.pipeline import RunPlan, check, run
    from qalora_export.recipe_file import load_recipe

    overrides = dict(_parse(text) for text in override or [])
    if out is not None:
        overrides["out"] = str(out)
    resolved = load_recipe(recipe, overrides)
    if dry_run:
        print_plan(check(resolved, force=force), results)
        console.print("nothing was run: the same command without --dry-run does")
        return
    plans = list[RunPlan]()

    def planned(plan: RunPlan) -> None:
        plans.append(plan)
        print_plan(plan, console)

    report = run(resolved, force=force, on_plan=planned, on_stage=_show)
    print_durations(plans[0], report)
    console.print(f"ran: {', '.join(report.ran) or 'nothing'}; up to date: {', '.join(report.skipped) or 'nothing'}")
    from qalora_export.cli.run_summary import print_summary

    print_summary(resolved)
    artifacts = (report.out / name for name in ("model.gguf", "onnx", "merged.qalora"))
    next_command(shlex.join(["qalora-export", "inspect", str(next(path for path in artifacts if path.exists()))]))


def _show(stage: str, report: Any) -> None:
    """The findings of verify-parity as soon as they are known: a run that fails ends with an exception."""
    from qalora_export.cli.parity_table import print_report
    from qalora_export.stages import VERIFY

    if stage == VERIFY:
        print_report(report)


def _parse(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise InputError("--set needs KEY=VALUE", where=text, fix="for example --set train.rank=8")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
