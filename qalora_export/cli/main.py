"""The command line: a thin skin over the public functions; one file per verb."""

from __future__ import annotations

import os
import sys
import traceback
from typing import NoReturn

# Models are local folders: nothing here may reach for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import typer

from qalora_export.console import console
from qalora_export.errors import ExitCode, QaloraError, from_system
from qalora_export.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Quantize a language model, fine-tune it with QA-LoRA, merge without loss, export the same numbers to GGUF "
    "and ONNX, and prove it.\n\n"
    "Exit codes: 0 pass · 1 parity failed · 2 bad usage, recipe or input · 3 a requested runtime is missing or crashed "
    "· 4 unsafe input.",
)
export_app = typer.Typer(no_args_is_help=True, help="Write the checkpoint's own numbers in a runtime's format.")
app.add_typer(export_app, name="export")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"qalora-export {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print version."),
) -> None:
    """Options before the verb."""


def _register_verbs() -> None:
    from qalora_export.cli import verbs

    verbs.register(app, export_app)


INTERNAL_ERROR = 70  # sysexits.h EX_SOFTWARE; 1 would say that parity failed


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `qalora-export`: our errors, and the system's, as one clear message and their exit code.

    Anything else is a defect of ours: its traceback is shown and the exit code is none of the documented ones.
    """
    _register_verbs()
    try:
        app(args=arguments, prog_name="qalora-export")
    except QaloraError as error:
        _fail(error)
    except KeyboardInterrupt:
        console.print("[bold red]interrupted[/bold red]; finished stages are kept, run the same command again to go on")
        sys.exit(130)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(int(ExitCode.OK))
    except Exception as error:
        if (known := from_system(error)) is not None:
            _fail(known)
        console.print(traceback.format_exc(), markup=False)
        console.print("[bold red]internal error:[/bold red] a defect of qalora-export; please report the lines above")
        sys.exit(INTERNAL_ERROR)


def _fail(error: QaloraError) -> NoReturn:
    console.print(f"[bold red]error:[/bold red] {_escape(error.what)}")
    for label, text in (("where", error.where), ("why", error.why), ("next", error.fix)):
        if text:
            console.print(f"  [dim]{label}:[/dim] {_escape(text)}")
    sys.exit(int(error.code))


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    main()
