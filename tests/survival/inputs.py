"""What the commands of test_rivals and test_signals read; nothing of it is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.qalora.adapters import own_adapter
from tests.survival.driven import write_recipe
from tests.verify.exports import Exported


@dataclass(frozen=True)
class Inputs:
    """folder: recipe, data, and the adapters "one" and "two" over `base`."""

    folder: Path
    model: Path
    base: Path
    artifacts: Exported

    @property
    def adapters(self) -> tuple[Path, Path]:
        return self.folder / "one", self.folder / "two"

    @property
    def data(self) -> Path:
        return self.folder / "data.jsonl"


def fill(folder: Path, base: Path) -> None:
    for name, rank in (("one", 2), ("two", 3)):
        own_adapter(base, folder / name, rank=rank)
    write_recipe(folder)
