"""Which module implements which verb. Each has `command`, a typer function whose docstring is the help text."""

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from pathlib import Path

import typer

from qalora_export.safety.paths import local_path

VERBS = {
    "quantize": "qalora_export.cli.quantize",
    "train": "qalora_export.cli.train",
    "merge": "qalora_export.cli.merge",
    "evaluate": "qalora_export.cli.evaluate",
    "compare": "qalora_export.cli.compare",
    "verify-parity": "qalora_export.cli.verify_parity",
    "apply": "qalora_export.cli.apply",
    "run": "qalora_export.cli.run",
    "inspect": "qalora_export.cli.inspect",
    "doctor": "qalora_export.cli.doctor",
}
EXPORTS = {
    "gguf": "qalora_export.cli.export_gguf",
    "onnx": "qalora_export.cli.export_onnx",
    "patch": "qalora_export.cli.export_patch",
}


def register(app: typer.Typer, export_app: typer.Typer) -> None:
    """Attach every verb; the modules import heavy packages only when their command runs."""
    for target, table in ((app, VERBS), (export_app, EXPORTS)):
        if not target.registered_commands:
            for name, module in table.items():
                target.command(name)(with_home(import_module(module).command))


def with_home(command: Callable[..., None]) -> Callable[..., None]:
    """The command with ~ expanded in every path: a shell leaves it alone in --out=~/x."""

    @wraps(command)
    def call(**values: object) -> None:
        command(**{name: local_path(value) if isinstance(value, Path) else value for name, value in values.items()})

    return call
