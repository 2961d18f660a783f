"""What a pre-flight finds: everything that would stop the run, not only the first of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from qalora_export.errors import InputError, QaloraError, together


@dataclass
class Findings:
    """problems: (stage, error) in the order they were found. notes: what is no obstacle. aliases: text in the place of
    an error -> what a user knows it by (scratch folders that will be gone).
    """

    problems: list[tuple[str, QaloraError]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """What the block raises for its input is kept, and the block ends there."""
        try:
            yield
        except QaloraError as error:
            self.add(stage, error)

    def add(self, stage: str, error: QaloraError) -> None:
        """One more problem, unless it is known already."""
        where = error.where
        for text, name in self.aliases.items():
            where = where.replace(text, name)
        kind = type(error) if type(error).__module__ == QaloraError.__module__ else InputError
        error = error if where == error.where else kind(error.what, where=where, why=error.why, fix=error.fix)
        if str(error) not in {str(known) for _, known in self.problems}:
            self.problems.append((stage, error))

    def replace(self, stage: str, parts: Sequence[QaloraError], whole: QaloraError) -> None:
        """`whole` takes the place of those of its parts that are here."""
        texts = {str(part) for part in parts}
        self.problems = [known for known in self.problems if str(known[1]) not in texts]
        self.add(stage, whole)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def of(self, stage: str) -> list[QaloraError]:
        return [error for name, error in self.problems if name == stage]

    def raise_any(self) -> None:
        """Raise the one problem, or one error that holds them all."""
        if self.problems:
            raise together([error for _, error in self.problems])
