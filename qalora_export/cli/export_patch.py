"""`qalora-export export patch`: a fine-tune as the difference from another one of its base."""

from __future__ import annotations

import shlex
from pathlib import Path

import typer


def command(
    old: Path = typer.Argument(..., help="GGUF file or ONNX folder that devices have: of the base, or of a fine-tune"),
    new: Path = typer.Argument(..., help="the same of another fine-tune of that base, exported with the same settings"),
    out: Path = typer.Option(..., "--out", help="patch to write"),
    force: bool = typer.Option(False, "--force", help="replace the file if it exists"),
) -> None:
    """Write what one fine-tune differs in from another of the same base: offsets, trained scales, and names.

    Both are read tensor by tensor; codes must be equal. `qalora-export apply`, or on a device without torch
    `python -m qalora_runtimes apply`, puts the patch into the old artifact in place, and takes it out again.

    [bold]Examples[/bold]

      qalora-export export patch lamps/model.gguf heating/model.gguf --out heating.patch

      qalora-export export patch lamps/onnx heating/onnx --out heating-onnx.patch
    """
    from qalora_export.console import console, next_command, styled
    from qalora_export.formats.patch.export import export_patch

    report = export_patch(old, new, out, force=force)
    size, share = f"{report.nbytes:,} bytes", f"{100 * report.nbytes / report.of:.2f} %"
    console.print(styled("{}: {}, {} of the artifact; ", str(report.out), size, share), end="")
    console.print(f"{report.moved:,} of {report.offsets:,} stored numbers differ")
    next_command(shlex.join(["qalora-export", "apply", str(out), str(old)]))
