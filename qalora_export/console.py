"""What the user sees: progress and messages on stderr, results on stdout.

Names, paths and texts come from files that anyone may have made. So a plain string is printed as it is, never read as
markup, and no character that could steer a terminal gets through; style is given by `styled` alone.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn, TypeVar

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Span, Text

from qalora_export.errors import printable

T = TypeVar("T")
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


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar, elapsed time and ETA (plain when stderr is no terminal)."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=False) as progress:
        yield from progress.track(items, total=total, description=description)


def next_command(command: str) -> None:
    """Print what the user would run after this stage."""
    console.print(styled("[dim]next:[/dim] {}", command))
