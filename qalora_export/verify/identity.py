"""Which files were verified: hashed before the first gate and after the last, so that none can change in between."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from qalora_export.safety import FileIdentity, HashedOnce

Identities = dict[Path, FileIdentity]


def identities(*roots: Path, hashed: HashedOnce) -> Identities:
    """Every file of the given files and folders, by its path. hashed: what is known already; after the last gate,
    nothing may be.
    """
    found: Identities = {}
    for root in roots:
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if path.is_file():
                found[path] = hashed.identity(path)
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
        elif (old.modified_ns, old.inode) == (new.modified_ns, new.inode):
            what = "was touched (permissions, links, or other bytes for a while)"
        else:
            what = "was written again"
        lines.append(f"{path.name} {what} while it was verified")
    return lines


def combined(files: Iterable[tuple[str, FileIdentity]]) -> str:
    """The listing of names and hashes that a sha256 over several files is taken of."""
    return "".join(f"{name} {identity.sha256}\n" for name, identity in files)
