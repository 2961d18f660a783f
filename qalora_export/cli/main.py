"""The command line: a thin skin over the public functions; one file per verb."""

from __future__ import annotations

import io
import os
import sys
import traceback

# Nothing here reaches for a hub by itself. Only models/sources.py may, for a hub id that the user named, and it must
# tell this default from a user who wants to stay offline.
if "HF_HUB_OFFLINE" not in os.environ:
    os.environ |= {"HF_HUB_OFFLINE": "1", "QALORA_MAY_DOWNLOAD": "1"}

import typer

from qalora_export.cli.signals import Ending, ends_on_signals
from qalora_export.console import console, leave_closed_pipe, listening, styled
from qalora_export.errors import ExitCode, InputError, QaloraError, from_system
from qalora_export.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Quantize a language model, fine-tune it with QA-LoRA, merge without loss, export the same numbers to GGUF "
    "and ONNX, and prove it.\n\n"
    "Exit codes: 0 pass · 1 parity failed · 2 bad usage, recipe or input · 3 a requested runtime, or what a merge was "
    "made from, is missing · 4 unsafe input. Others: 70 a defect of qalora-export · 128 + n ended by signal n (130 "
    "Ctrl-C, 143 SIGTERM) · "
    "141 the reader of its output went away.\n\n"
    "1 means that numbers which must be equal are not, and nothing else: a gate failed (verify-parity, run), what was "
    "written does not read back the same (merge, export), two artifacts differ or one is not what its manifest "
    "records (inspect).",
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
INTERRUPTED = 130
UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # typer carries its own copy of click


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `qalora-export`: our errors, and the system's, as one clear message and their exit code.

    Anything else is a defect of ours: its traceback is shown and the exit code is none of the documented ones.
    """
    with ends_on_signals() as ending, listening():
        _main(arguments, ending)


def _main(arguments: list[str] | None, ending: Ending) -> None:
    _encode_anything()
    _register_verbs()
    try:
        code = _run(arguments, ending)
        for stream in (sys.stdout, sys.stderr):  # what the system refuses now, it would refuse at exit, unseen
            if stream is not None:
                stream.flush()
    except BrokenPipeError:
        leave_closed_pipe()
    except OSError as error:  # not even a message can be written
        code = INTERNAL_ERROR if (known := from_system(error)) is None else int(known.code)
    sys.exit(code)


def _run(arguments: list[str] | None, ending: Ending) -> int:
    """Run the command line; the exit code."""
    try:
        code = app(args=arguments, prog_name="qalora-export", standalone_mode=False)
    except BrokenPipeError:
        raise
    except UsageError as error:
        return _bad_usage(error)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # the console of typer's help ends with 1 on it
            leave_closed_pipe()
        if end.code is None or (isinstance(end.code, int) and end.code != int(ExitCode.PARITY_FAILED)):
            raise
        return _defect()  # a library that gave up; 1, and any text, would say that parity failed
    except BaseException as error:  # a panic of a native library is no Exception
        if ending.by is not None:  # a signal, or what a library made of it
            raise
        known = error if isinstance(error, QaloraError) else from_system(error)
        return _report(known) if known is not None else _defect()
    if code == INTERRUPTED:
        console.print(styled("[bold red]interrupted[/]; finished stages are kept, run the same command again to go on"))
    return code if isinstance(code, int) else int(ExitCode.OK)


def _encode_anything() -> None:
    """A terminal that cannot show a character shows its code; it is no reason to fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _bad_usage(error: Exception) -> int:
    context = getattr(error, "ctx", None)
    text = getattr(error, "format_message", lambda: str(error))()
    if type(error).__name__ == "NoArgsIsHelpError":  # the help is printed already, or is the message
        if text:
            console.print(text)
        return int(ExitCode.BAD_INPUT)
    command = context.command_path if context is not None else "qalora-export"
    return _report(InputError(text, fix=f"{command} --help"))


def _report(error: QaloraError) -> int:
    if error.several:
        for each in error.several:
            _report(each)
        console.print(styled("[bold red]{}[/bold red]", error.what))
        return int(error.code)
    console.print(styled("[bold red]error:[/bold red] {}", _indented(error.what)))
    for label, text in (("where", error.where), ("why", error.why), ("next", error.fix)):
        if text:
            console.print(styled(f"  [dim]{label}:[/dim] {{}}", _indented(text)))
    return int(error.code)


def _indented(text: str) -> str:
    """No line of a message may look like the beginning of another one."""
    return "\n    ".join(text.splitlines())


def _defect() -> int:
    console.print(traceback.format_exc())
    console.print(styled("[bold red]internal error:[/] a defect of qalora-export; please report the lines above"))
    return INTERNAL_ERROR


if __name__ == "__main__":
    main()
