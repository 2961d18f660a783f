"""qalora-export export gguf"""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from qalora_export.formats.export_report import ExportReport


class LayoutOption(StrEnum):
    Q4_1 = "q4_1"
    SPLIT = "split"


def command(
    checkpoint: Path = typer.Argument(..., help="Canonical checkpoint (qalora-export quantize or merge)."),
    out: Path = typer.Option(..., "--out", help="GGUF file to write; with --adapter, the LoRA adapter file."),
    layout: LayoutOption = typer.Option(
        LayoutOption.Q4_1, help="q4_1: one self-contained file. split: Q4_0 base and an exact LoRA adapter."
    ),
    adapter: Path | None = typer.Option(
        None, help="Write only this trained adapter, as a llama.cpp LoRA over the exported base CHECKPOINT."
    ),
    allow_text_differences: bool = typer.Option(
        False,
        "--allow-text-differences",
        help="Export a tokenizer that llama.cpp knows in its nearest form only (o200k, Tekken).",
    ),
    force: bool = typer.Option(False, "--force", help="Replace the output if it exists."),
) -> None:
    """Write the checkpoint's own codes, scales and offsets as GGUF for llama.cpp.

    Nothing is requantized: the file is read back with llama.cpp's own Python reader before it appears under OUT, and
    one differing value is an error. OUT.manifest.json holds the hashes and is written last.

    [bold]Examples[/bold]

    One file that runs anywhere llama.cpp runs:

        qalora-export export gguf merged.qalora --out model.gguf

    A Q4_0 base, which has faster prefill kernels on x86, and model.lora.gguf with the exact rest:

        qalora-export export gguf merged.qalora --out model.gguf --layout split

    Many fine-tunes over one base file: the base once, then each adapter.

        qalora-export export gguf base.qalora --out base.gguf --layout split

        qalora-export export gguf base.qalora --adapter kitchen-adapter --out kitchen.lora.gguf
    """
    from qalora_export.console import console, next_command

    if adapter is not None:
        from qalora_export.qalora.export_adapter import export_gguf_adapter

        tuned = export_gguf_adapter(checkpoint, adapter, out, force=force)
        console.print(f"wrote {tuned.path} ({tuned.modules} modules, {tuned.nbytes:,} bytes)")
        console.print(
            f"{tuned.rounded:,} of {tuned.offsets:,} offsets differ from the merged checkpoint's by fp16 rounding only "
            f"(largest {tuned.largest:.3g}, relative error {tuned.nmse:.2g})"
        )
        next_command(shlex.join(["llama-cli", "-m", "BASE.gguf", "--lora", str(out)]))
        return

    from qalora_export.formats.gguf.export import export_gguf
    from qalora_export.recipe import GgufSettings

    settings = GgufSettings(layout=layout.value, allow_text_differences=allow_text_differences)
    report = export_gguf(checkpoint, out, settings, force=force)
    console.print(_table(report))
    for note in report.notes:
        console.print(note)
    report_folder = out.with_name(f"{out.stem}-parity")
    next_command(
        shlex.join(["qalora-export", "verify-parity", str(checkpoint), "--gguf", str(out), "--out", str(report_folder)])
    )


def _table(report: ExportReport) -> object:
    from rich.table import Table

    table = Table(title=str(report.files[0]), title_justify="left")
    table.add_column("what")
    table.add_column("count", justify="right")
    for kind, count in sorted(report.types.items()):
        table.add_row(f"{kind} tensors", str(count))
    table.add_row("bytes on disk", f"{report.bytes:,}")
    table.add_row("values read back", f"{report.compared:,}")
    table.add_row("values that differ", str(report.differing))
    return table
