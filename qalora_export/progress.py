"""Progress of long work. A stage reports it here; who runs the stage decides what is seen.

As a library nothing is printed: while a task is open, one line a minute with done, total and ETA goes to the logger of
this module at level INFO, and nothing at all happens where nobody listens. The command line shows bars on a terminal
(console.Bars) and these lines everywhere else, so a log file tells how far an hour-long job is.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")
logger = logging.getLogger(__name__)
INTERVAL = 60.0  # seconds between two lines


class Task(Protocol):
    """One piece of work under way."""

    def update(self, done: int, detail: str = "") -> None:
        """`done` items are finished; detail: what else to show, for example the latest loss."""

    def close(self) -> None:
        """The work has ended, finished or not."""


class Reporter(Protocol):
    """What shows tasks."""

    def start(self, description: str, total: int | None, done: int) -> Task:
        """A new task; total is None when nobody knows it, done is above 0 for work that is taken up again."""


class Lines:
    """One line every `interval` seconds: the innermost open task, behind the counted ones it is part of, from a thread
    that lives while one is open.
    """

    def __init__(self, interval: float = INTERVAL) -> None:
        self._interval = interval
        self._open: list[_LineTask] = []
        self._ended: threading.Event | None = None

    def start(self, description: str, total: int | None, done: int) -> Task:
        task = _LineTask(self, description, total, done)
        self._open.append(task)
        if self._ended is None and logger.isEnabledFor(logging.INFO):
            self._ended = threading.Event()
            threading.Thread(target=self._beat, args=(self._ended,), name="progress", daemon=True).start()
        return task

    def end(self, task: _LineTask) -> None:
        self._open.remove(task)
        if not self._open and self._ended is not None:
            self._ended.set()
            self._ended = None

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(self._interval):
            if line := self.line():
                logger.info("%s", line)

    def line(self) -> str:
        """What to say now; empty when nothing is open."""
        opened = list(self._open)
        around = [task.place() for task in opened[:-1] if task.counted]
        return " · ".join([*around, *(task.line() for task in opened[-1:])])


class _LineTask:
    def __init__(self, lines: Lines, description: str, total: int | None, done: int) -> None:
        self._lines, self._description, self._total = lines, description, total
        self._first, self._done, self._detail, self._began = done, done, "", time.monotonic()

    def update(self, done: int, detail: str = "") -> None:
        self._done, self._detail = done, detail

    def close(self) -> None:
        self._lines.end(self)

    @property
    def counted(self) -> bool:
        return self._total is not None

    def line(self) -> str:
        elapsed = time.monotonic() - self._began
        parts = [f"{duration(elapsed)} elapsed"]
        if self._total is not None:
            parts = [f"{self._done}/{self._total}", *parts, f"ETA {self._left(elapsed)}"]
        return f"{self._description}: {', '.join([*parts, *filter(None, [self._detail])])}"

    def place(self) -> str:
        """In front of the line of a task that is part of this one."""
        return f"{self._description} {self._done}/{self._total}, ETA {self._left(time.monotonic() - self._began)}"

    def _left(self, elapsed: float) -> str:
        here = self._done - self._first
        return duration(elapsed * ((self._total or 0) - self._done) / here) if here else "unknown"


_reporter: Reporter = Lines()


def report_to(reporter: Reporter) -> Reporter:
    """Show tasks that start from now on with `reporter`; returns the one before."""
    global _reporter
    before, _reporter = _reporter, reporter
    return before


@contextmanager
def task(description: str, total: int | None = None, done: int = 0) -> Iterator[Task]:
    """Work whose steps the caller counts with `update`."""
    opened = _reporter.start(description, total, done)
    try:
        yield opened
    finally:
        opened.close()


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate and report how far it is; total is only needed when `items` has no len."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with task(description, total) as opened:
        for done, item in enumerate(items, 1):
            yield item
            opened.update(done)


@contextmanager
def status(description: str) -> Iterator[None]:
    """Work that cannot be counted."""
    with task(description):
        yield


def duration(seconds: float) -> str:
    """In the two largest units: 42 s, 3 min 12 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return "{} h {} min".format(*divmod(minutes, 60))
