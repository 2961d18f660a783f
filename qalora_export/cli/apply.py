"""`qalora-export apply`: put a patch into the artifact that lies here."""

from __future__ import annotations

import shlex
from pathlib import Path

import typer


def command(
    patch: Path = typer.Argument(..., help="what `export patch` wrote"),
    target: Path = typer.Argument(..., help="GGUF file or ONNX folder to change, in place unless --out is given"),
    reverse: bool = typer.Option(False, "--reverse", help="take the patch out again"),
    out: Path | None = typer.Option(None, "--out", help="write the changed artifact there, and leave TARGET as it is"),
    force: bool = typer.Option(False, "--force", help="replace what --out names, if this program made it"),
) -> None:
    """Turn an artifact into another fine-tune of its base, in place, or back with --reverse.

    The target must have the bytes that the patch was made for, and what comes out must have those that it promises;
    else nothing is changed. It is there whole, as the one or the other, at every moment.

    [bold]Examples[/bold]

      qalora-export apply heating.patch model.gguf

      qalora-export apply heating.patch model.gguf --reverse
    """
    from qalora_export.console import console, next_command, styled
    from qalora_export.formats.patch.apply import apply

    done = apply(patch, target, out, reverse=reverse, force=force)
    console.print(styled("{} is {} now; files written: {}", str(done.target), done.now, str(done.files)))
    next_command(shlex.join(["qalora-export", "inspect", str(done.target)]))
