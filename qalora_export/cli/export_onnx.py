"""`qalora-export export onnx`: a canonical checkpoint as a folder for ONNX Runtime and ONNX Runtime GenAI."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from qalora_export.recipe import OnnxSettings

if TYPE_CHECKING:
    from qalora_export.formats.export_report import ExportReport


def command(
    checkpoint: Path = typer.Argument(..., help="canonical checkpoint: made by `quantize` or `merge`"),
    out: Path = typer.Option(..., "--out", help="folder to write"),
    accuracy_level: int = typer.Option(
        OnnxSettings().accuracy_level,
        metavar="4|1",
        help="MatMulNBits kernels: 4 = int8 activations (fast, what you ship), 1 = float32 (slower, rounding-free)",
    ),
    allow_text_differences: bool = typer.Option(
        False,
        "--allow-text-differences",
        help="accept that ONNX Runtime GenAI's own tokenizer gives other ids to ordinary text, as predicted",
    ),
    force: bool = typer.Option(False, "--force", help="replace the folder if it exists"),
) -> None:
    """Write the checkpoint as ONNX, value for value.

    The folder holds onnx/model.onnx with its data, configurations and the tokenizer, and runs in ONNX Runtime, ONNX
    Runtime GenAI and transformers.js. Codes, scales and offsets are those of the checkpoint, embeddings, norms and
    lm_head keep their bytes; the written file is read back with the onnx package and kept only if no value differs.

    [bold]Examples[/bold]

      qalora-export export onnx merged.qalora --out onnx

      qalora-export export onnx merged.qalora --out onnx-exact --accuracy-level 1
    """
    from qalora_export.console import next_command
    from qalora_export.formats.onnx.export import export_onnx
    from qalora_export.recipe_file import validated

    chosen = {"accuracy_level": accuracy_level, "allow_text_differences": allow_text_differences}
    settings = validated(OnnxSettings, chosen, where="export onnx")
    _show(export_onnx(checkpoint, out, settings, force=force))
    report_folder = out.with_name(f"{out.name}-parity")
    next_command(
        shlex.join(["qalora-export", "verify-parity", str(checkpoint), "--onnx", str(out), "--out", str(report_folder)])
    )


def _show(report: ExportReport) -> None:
    from rich.table import Table

    from qalora_export.console import console

    table = Table(title=str(report.files[0].parent), title_justify="left")
    table.add_column("export onnx")
    table.add_column("", justify="right")
    for kind, count in sorted(report.types.items()):
        table.add_row(f"tensors, {kind}", str(count))
    table.add_row("files", str(len(report.files)))
    table.add_row("size", f"{report.bytes / 2**20:.1f} MiB")
    table.add_row("values read back", f"{report.compared:,}")
    table.add_row("values differing", str(report.differing))
    console.print(table)
    for note in report.notes:
        console.print(f"note: {note}")
