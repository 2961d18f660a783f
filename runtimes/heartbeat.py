"""How a runner tells its caller that it lives: one line in a small file, "steps done total what", rewritten as it goes.

The caller (process.run_module) reads it. A line that stays the same is no progress, whatever the CPU does.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

EVERY = 0.5  # seconds between two lines; what happens in between is only counted
MAX_BYTES = 1000
ANSWERED = "answered"  # the last line: nothing but the end of the process is left
TOKENS = ", tokens"  # ends the name of what is counted in tokens


@dataclass(frozen=True)
class Beat:
    """steps: grows with every sign of life. done of total, in units of what."""

    steps: int = 0
    done: int = 0
    total: int = 0
    what: str = "starting"

    def __str__(self) -> str:
        return f"{self.what}, {self.done} of {self.total}" if self.total else self.what


class _Heart:
    def __init__(self) -> None:
        self.path: Path | None = None
        self._beat, self._written = Beat(), 0.0

    def set(self, what: str, done: int, total: int) -> None:
        self._beat = Beat(self._beat.steps + 1, done, total, what)
        now = time.monotonic()
        if self.path is not None and (now - self._written >= EVERY or what == ANSWERED):
            self._written = now
            beat = self._beat
            self.path.write_text(f"{beat.steps} {beat.done} {beat.total} {beat.what}\n", encoding="utf-8")

    def advance(self, count: int) -> None:
        more = count if self._beat.what.endswith(TOKENS) else 0  # of questions, a token is only a sign of life
        self.set(self._beat.what, self._beat.done + more, self._beat.total)


_heart = _Heart()


def beat_to(path: Path | None) -> None:
    """Where this process writes its lines from now on; None: nowhere."""
    _heart.path = path
    at("starting")


def at(what: str, done: int = 0, total: int = 0) -> None:
    """Say what is being done, and how far it is."""
    _heart.set(what, done, total)


def advance(count: int = 1) -> None:
    """One or more further tokens."""
    _heart.advance(count)


def read(path: Path) -> Beat:
    """The last line of a runner; the first Beat where there is none (yet), or it is half written."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            steps, done, total, what = file.read(MAX_BYTES).rstrip("\n").split(" ", 3)
        return Beat(int(steps), int(done), int(total), what)
    except (OSError, ValueError):
        return Beat()
