"""Which files were verified: hashed before the first gate and after the last, so that none can change in between."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qalora_export.safety import sha256_file


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """The bytes of a file, and its place on the disk: a file that was replaced by another and put back differs here."""

    sha256: str
    size: int
    modified_ns: int
    inode: int


Identities = dict[Path, FileIdentity]


def identities(*roots: Path) -> Identities:
    """Every file of the given files and folders, by its path."""
    found: Identities = {}
    for root in roots:
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if path.is_file():
                found[path] = _identity(path)
    return found


def changes(before: Mapping[Path, FileIdentity], after: Mapping[Path, FileIdentity]) -> list[str]:
    """One line for each file that is not the one it was."""
    lines = []
    for path in sorted({*before, *after}):
        old, new = before.get(path), after.get(path)
        if old == new:
            continue
        if old is None or new is None:
            what = "appeared" if old is None else "is gone"
        elif old.sha256 != new.sha256:
            what = f"has other bytes (sha256 {old.sha256[:12]} before, {new.sha256[:12]} after)"
        else:
            what = "was written again"
        lines.append(f"{path.name} {what} while it was verified")
    return lines


def combined(files: Iterable[tuple[str, FileIdentity]]) -> str:
    """The listing of names and hashes that a sha256 over several files is taken of."""
    return "".join(f"{name} {identity.sha256}\n" for name, identity in files)


def _identity(path: Path) -> FileIdentity:
    before = path.stat()
    return FileIdentity(sha256_file(path), before.st_size, before.st_mtime_ns, before.st_ino)
