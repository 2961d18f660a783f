"""`qalora-export inspect FILE [OTHER]`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qalora_export.console import results, styled
from qalora_export.errors import InputError

if TYPE_CHECKING:
    from qalora_export.formats.contents import Comparison
    from qalora_export.inspection.view import View


def command(
    path: Annotated[Path, typer.Argument(help="Canonical checkpoint, adapter, ONNX folder, model folder or .gguf.")],
    other: Annotated[Path | None, typer.Argument(help="Compare with this one, value by value.")] = None,
    facts: Annotated[bool, typer.Option("--facts", help="Also print everything the file says about itself.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Hash every file and compare with the manifest.")] = False,
) -> None:
    """What an artifact holds: bits, groups, bytes by kind, provenance; or how two artifacts differ.

    Exit code 1, parity failed, when two artifacts differ or a file does not match its manifest; 2 when there is no
    manifest.

    [bold]Examples[/bold]

      qalora-export inspect build/demo/model.gguf

      qalora-export inspect build/demo/merged.qalora build/demo/onnx
    """
    from qalora_export.formats.contents import compare
    from qalora_export.inspection.view import open_view

    view = open_view(path)
    if other is not None:
        comparison = compare(view.contents, open_view(other).contents, progress="compare")
        _print_comparison(comparison)
        raise typer.Exit(0 if comparison.equal else 1)
    _print_view(view, facts=facts)
    if check:
        raise typer.Exit(_check(view))


def _print_view(view: View, *, facts: bool) -> None:
    from rich.table import Table

    from qalora_export.inspection.view import byte_table

    results.print(styled("[bold]{}[/bold] {}  {} bytes on disk", view.kind, view.path, f"{view.bytes_on_disk:,}"))
    table = Table("kind", "tensors", "parameters", "bytes")
    rows = byte_table(view)
    for kind, (count, parameters, size) in rows.items():
        table.add_row(kind, str(count), f"{parameters:,}", f"{size:,}")
    parameters, size = sum(row[1] for row in rows.values()), sum(row[2] for row in rows.values())
    table.add_row("all", str(sum(row[0] for row in rows.values())), f"{parameters:,}", f"{size:,}", style="bold")
    results.print(table)
    results.print(f"{8 * size / max(1, parameters):.3f} bits per parameter")
    if facts:
        for key, value in view.facts.items():
            results.print(f"  {key}: {value}")
    if view.manifest is None:
        results.print("no manifest: provenance unknown")
        return
    results.print(f"made by {view.manifest.get('created_by')} as {view.manifest.get('kind')}")
    for parent in view.manifest.get("parents", []):
        results.print(f"  from {parent.get('role')} {parent.get('name')} {parent.get('sha256')}")


def _print_comparison(comparison: Comparison) -> None:
    for label, names in (("only in the first", comparison.only_left), ("only in the second", comparison.only_right)):
        for name in names:
            results.print(f"{label}: {name}")
    for name, found in comparison.matrices.items():
        why = f" ({comparison.reasons[name]})" if name in comparison.reasons else ""
        results.print(f"{name}: {found.codes} codes, {found.scale} scales, {found.offset} offsets differ{why}")
    for name, count in comparison.tensors.items():
        results.print(f"{name}: {count} values differ")
    verdict = "[green]equal[/green]" if comparison.equal else "[bold red]different[/bold red]"
    results.print(styled(f"{verdict}: {{}} tensors compared", comparison.compared))


def _check(view: View) -> int:
    from qalora_export.checkpoint.manifest import verify_files

    if view.manifest is None:
        raise InputError(
            "no manifest to check against",
            where=view.path,
            fix="fetch the artifact together with its manifest",
        )
    folder = view.path if view.path.is_dir() else view.path.parent
    wrong = verify_files(folder, view.manifest["files"])
    for name in wrong:
        results.print(styled("[bold red]does not match its manifest[/bold red]: {}", name))
    if not wrong:
        results.print(styled("[green]intact[/green]: {} files match their sha256", len(view.manifest["files"])))
    return 1 if wrong else 0
