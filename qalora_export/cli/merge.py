"""qalora-export merge"""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from qalora_export.qalora.merge import MergeReport


class ConventionOption(StrEnum):
    auto = "auto"
    sum = "sum"
    mean = "mean"
    peft = "peft"


def command(
    base: Path = typer.Argument(..., help="Canonical checkpoint the adapter was trained on (qalora-export quantize)."),
    adapter: Path = typer.Argument(..., help="Adapter folder: ours, or PEFT's layout with safetensors."),
    out: Path = typer.Option(..., "--out", help="Folder for the merged checkpoint."),
    convention: ConventionOption = typer.Option(
        ConventionOption.auto, help="How the adapter pools its input; auto takes what the adapter itself declares."
    ),
    compare_logits: bool = typer.Option(True, help="Run the model before and after and require equal bits."),
    force: bool = typer.Option(False, "--force", help="Replace the output if it exists."),
) -> None:
    """Merge a QA-LoRA adapter into its INT4 base without loss.

    Only offsets move, and scales where they were trained (train --scales); codes stay byte for byte, and the logits of
    the merged checkpoint equal those of base + adapter bit for bit. Both are checked on the written files before they
    appear under OUT.

    [bold]Examples[/bold]

    An adapter trained here:

        qalora-export merge base.qalora adapter --out merged.qalora

    An adapter trained by PEFT with use_qalora (recognised by its config):

        qalora-export merge base.qalora peft-adapter --out merged.qalora

    An adapter of the QA-LoRA authors' code, which averages where the paper sums:

        qalora-export merge base.qalora their-adapter --out merged.qalora --convention mean
    """
    from qalora_export.console import console, next_command
    from qalora_export.qalora.merge import merge

    report = merge(base, adapter, out, convention=convention.value, force=force, compare_logits=compare_logits)
    console.print(_table(report))
    console.print(f"merged checkpoint: {out}")
    next_command(shlex.join(["qalora-export", "export", "gguf", str(out), "--out", str(out.with_suffix(".gguf"))]))


def _table(report: MergeReport) -> object:
    from rich.table import Table

    table = Table(title=f"merge ({report.adapted} of {report.modules} modules, convention {report.convention})")
    table.add_column("what")
    table.add_column("changed", justify="right")
    table.add_column("must be")
    table.add_row("codes", f"{report.changed_codes:,}", "0")
    table.add_row("scales", f"{report.changed_scales:,}", "" if report.scales_trained else "0")
    table.add_row("offsets", f"{report.changed_offsets:,} of {report.offsets:,}", "")
    table.add_row("other tensors", f"{report.changed_other_tensors:,}", "0")
    if report.logits_compared is not None:
        table.add_row("logits", f"{report.logits_differing:,} of {report.logits_compared:,}", "0")
    return table
