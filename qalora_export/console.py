"""What the user sees: progress and messages on stderr, results on stdout.

Names, paths and texts come from files that anyone may have made. So a plain string is printed as it is, never read as
markup, and no character that could steer a terminal gets through; style is given by `styled` alone.
"""

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Column
from rich.text import Span, Text

from qalora_export.errors import printable
from qalora_export.progress import Lines, Task, report_to
from qalora_export.progress import track as track

PLACE = "\ue000"  # of the private use area, so that no template holds it
CLOSED_PIPE = 128 + 13  # what a shell reports for a program that SIGPIPE ended; 0 would say that everything passed


def leave_closed_pipe() -> NoReturn:
    """End quietly: whoever read our output (`| head`) has seen enough."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):  # else the interpreter would complain while flushing them
        try:
            os.dup2(null, stream.fileno())
        except (AttributeError, OSError, ValueError):  # closed, or not a file at all
            continue
    raise SystemExit(CLOSED_PIPE)


class SafeConsole(Console):
    """rich's console for texts of unknown origin: no markup, no emoji codes, nothing that is not printable."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, soft_wrap=True, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)  # before the layout, so that tables stay aligned

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if not segment.control and not segment.text.isprintable():
                segment = Segment(printable(segment.text), segment.style)
            yield segment

    def on_broken_pipe(self) -> None:
        leave_closed_pipe()


console = SafeConsole(stderr=True)
results = SafeConsole()


def styled(template: str, *values: object) -> Text:
    """Text with rich's markup in `template`; each value takes the place of one {}, with its style and as plain text."""
    marked = Text.from_markup(template.replace("{}", PLACE), emoji=False)
    places = [index for index, character in enumerate(marked.plain) if character == PLACE]
    pieces = marked.divide([edge for place in places for edge in (place, place + 1)])
    given = iter(values)
    return Text().join(_filled(piece, next(given)) if piece.plain == PLACE else piece for piece in pieces)


def _filled(place: Text, value: object) -> Text:
    text = printable(value)
    return Text(text, spans=[Span(0, len(text), span.style) for span in place.spans])


class Bars:
    """Progress bars with elapsed time and ETA; an inner task is one more row, uncounted work a row while it lasts."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._open = 0

    def start(self, description: str, total: int | None, done: int) -> Task:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}", markup=False),
                console=console,
            )
            self._progress.start()
        self._open += 1
        row = self._progress.add_task(printable(description), total=total, completed=done, detail="")
        return _Bar(self, self._progress, row, counted=total is not None)

    def end(self) -> None:
        self._open -= 1
        if self._open == 0:
            self.stop()

    def stop(self) -> None:
        """Give the terminal back, whatever is still open."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class _Bar:
    def __init__(self, bars: Bars, progress: Progress, row: TaskID, *, counted: bool) -> None:
        self._bars, self._progress, self._row, self._counted = bars, progress, row, counted

    def update(self, done: int, detail: str = "") -> None:
        self._progress.update(self._row, completed=done, detail=printable(detail))

    def close(self) -> None:
        self._progress.stop_task(self._row)
        if not self._counted:
            self._progress.remove_task(self._row)
        self._bars.end()


class ConsoleHandler(logging.Handler):
    """Log records as lines above the bars; with the time where a log file and no person is listening."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            style = "yellow" if record.levelno >= logging.WARNING else "default"
            written = time.strftime("%Y-%m-%d %H:%M:%S ", time.localtime(record.created))
            console.print(styled(f"{{}}[{style}]{{}}[/]", "" if console.is_terminal else written, record.getMessage()))
        except Exception:
            self.handleError(record)


@contextmanager
def listening() -> Iterator[None]:
    """Show progress and the log of this package; what `qalora-export` does and the library never does by itself."""
    ours, handler, bars = logging.getLogger("qalora_export"), ConsoleHandler(), Bars()
    level, reporter = ours.level, report_to(bars if console.is_terminal else Lines())
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        bars.stop()
        ours.setLevel(level)
        ours.removeHandler(handler)
        report_to(reporter)


def next_command(command: str) -> None:
    """Print what the user would run after this stage."""
    console.print(styled("[dim]next:[/dim] {}", command))
