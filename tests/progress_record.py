"""A reporter that keeps every task it is told of, to see what a stage shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from qalora_export.progress import Task, report_to


@dataclass
class Recorded:
    """One task: what it was called, how much there was, how far it came, every detail it told."""

    description: str
    total: int | None
    done: int
    details: list[str] = field(default_factory=list)
    closed: bool = False
    updates: int = 0

    def update(self, done: int, detail: str = "") -> None:
        self.done, self.updates = done, self.updates + 1
        self.details += [detail] if detail else []

    def close(self) -> None:
        self.closed = True


class _Recorder:
    def __init__(self) -> None:
        self.tasks: list[Recorded] = []

    def start(self, description: str, total: int | None, done: int) -> Task:
        self.tasks.append(Recorded(description, total, done))
        return self.tasks[-1]


@contextmanager
def recorded() -> Iterator[list[Recorded]]:
    """The tasks that were started inside the block."""
    recorder = _Recorder()
    before = report_to(recorder)
    try:
        yield recorder.tasks
    finally:
        report_to(before)
