"""What an export stage reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ExportReport:
    """files: what was written, manifest last; types: tensors per storage type; bytes: total size on disk.

    compared and differing: values read back from the written file and checked against the checkpoint; an exporter
    raises before it reports a differing count above 0. notes: what a user may want to know about this artifact.
    """

    files: tuple[Path, ...]
    types: dict[str, int]
    bytes: int
    compared: int
    differing: int
    notes: tuple[str, ...] = ()
