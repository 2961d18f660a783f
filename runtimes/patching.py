"""Put a fine-tune into the artifact that lies here, or take it out again: the device's side of patches.py.

A single file is written beside itself and renamed; a folder is built beside itself, its unchanged files as hard links,
and the two change places in one step where the system can (Linux), so whoever opens a path finds one model or the
other, whole. What a killed run left is removed by the next one.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qalora_runtimes.packs import sha256_file
from qalora_runtimes.patches import LORA, MANIFEST, NEW, OLD, PatchedFile, PatchFile, beside
from qalora_runtimes.protocol import ProtocolError

MARK = ".qalora-patch"  # in the names of what is unfinished
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@dataclass(frozen=True)
class Applied:
    """target: what now has the other side's bytes. files: how many were written. now: the name of what it is."""

    target: Path
    files: int
    now: str


def apply_patch(patch: Path, target: Path, *, reverse: bool = False, out: Path | None = None) -> Applied:
    """Turn the artifact `target` (a file or a folder) from the patch's old side into its new one; reverse: back.

    out: write there, which must not exist, and leave `target` as it is. Raises ProtocolError, and changes nothing, for
    a damaged patch, a target that the patch is not for and one that has its other side already; OSError.
    """
    opened = PatchFile(patch)
    before, after = (NEW, OLD) if reverse else (OLD, NEW)
    folder = opened.table.kind == "folder"
    parts = {LORA, MANIFEST} & {*opened.table.same, *(file.path for file in opened.table.files)}
    for place in [] if out is None else [out, *(beside(out, part) for part in sorted(parts))]:
        if place.exists() or place.is_symlink():
            raise ProtocolError(f"{place}: exists already")
    _restore(target)
    if folder != target.is_dir() or not target.exists():
        raise ProtocolError(f"{target}: the patch is for a {'folder' if folder else 'file'}")
    changed = _require(opened, target, before, after)
    if not changed:
        raise ProtocolError(f"{target}: is {opened.table.names.get(after)!r} already; --reverse goes back")
    write = _folder if folder else _files
    write(opened, target, changed, reverse=reverse, out=out)
    return Applied(out or target, len(changed), str(opened.table.names.get(after)))


def _place(target: Path, path: str) -> Path:
    return target / path if target.is_dir() else beside(target, path)


def _require(opened: PatchFile, target: Path, before: str, after: str) -> list[PatchedFile]:
    """The files that are still as before the patch. A file may be as after it: a run that was killed wrote it."""
    todo = []
    for name, digest in opened.table.same.items():
        place = _place(target, name)
        if not place.is_file() or sha256_file(place) != digest:
            raise ProtocolError(f"{place}: is not the file that the patch was made beside")
    for file in opened.table.files:
        place, found = _place(target, file.path), _identity(_place(target, file.path))
        if found == _of(file, before):
            todo.append(file)
        elif found != _of(file, after):
            raise ProtocolError(f"{place}: is neither what the patch changes nor what it makes; nothing was changed")
    return todo


def _identity(path: Path) -> tuple[int, str] | None:
    return (path.stat().st_size, sha256_file(path)) if path.is_file() else None


def _of(file: PatchedFile, side: str) -> tuple[int, str] | None:
    found = file.side(side)
    return None if found is None else (found["size"], found["sha256"])


def _files(opened: PatchFile, target: Path, changed: list[PatchedFile], *, reverse: bool, out: Path | None) -> None:
    """A file, its adapter and its manifest, which is renamed last: until then it does not fit, and readers say so."""
    goal, temporaries = out or target, list[tuple[Path, Path]]()
    try:
        for file in sorted(changed, key=lambda one: one.path):
            place = _place(goal, file.path)
            if file.side(OLD if reverse else NEW) is None:
                continue
            temporary = place.with_name(f".{place.name}{MARK}")
            temporaries.append((temporary, place))
            _write(opened, file, _place(target, file.path), temporary, reverse=reverse)
        for temporary, place in temporaries:
            temporary.replace(place)
        for file in changed:
            if out is None and file.side(OLD if reverse else NEW) is None:
                _place(target, file.path).unlink()
        if out is not None:  # what needs no change comes along
            others = {file.path for file in opened.table.files} - {file.path for file in changed}
            for name in (*opened.table.same, *others):
                if _place(target, name).is_file():
                    shutil.copyfile(_place(target, name), _place(out, name))
        _sync(goal.parent)
    finally:
        for temporary, _ in temporaries:
            temporary.unlink(missing_ok=True)


def _folder(opened: PatchFile, target: Path, changed: list[PatchedFile], *, reverse: bool, out: Path | None) -> None:
    goal = out or target
    fresh = goal.with_name(f".{goal.name}{MARK}")
    by_path = {file.path: file for file in opened.table.files}
    todo = {file.path for file in changed}
    try:
        fresh.mkdir()
        for path in _below(target):
            name = path.relative_to(target).as_posix()
            if name not in todo:
                _linked(path, fresh / name, copy=out is not None)
        for name in sorted(todo):
            if by_path[name].side(OLD if reverse else NEW) is not None:
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                source = target / name if (target / name).exists() else None
                _write(opened, by_path[name], source, fresh / name, reverse=reverse)
        if out is not None:
            fresh.rename(out)
        else:
            _exchange(fresh, target)
        _sync(goal.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write(opened: PatchFile, file: PatchedFile, source: Path | None, out: Path, *, reverse: bool) -> None:
    """The other side of a file, synced. Raises ProtocolError where it does not come out as promised."""
    digest, promised = hashlib.sha256(), file.side(OLD if reverse else NEW)
    assert promised is not None
    with out.open("wb") as stream:
        for part in opened.other_side(file, source, reverse=reverse):
            digest.update(part)
            stream.write(part)
        stream.flush()
        os.fsync(stream.fileno())
    if (out.stat().st_size, digest.hexdigest()) != (promised["size"], promised["sha256"]):
        raise ProtocolError(f"{opened.path}: does not give {file.path or 'the file'} as promised; nothing was changed")
    if source is not None:
        shutil.copymode(source, out)


def _below(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ProtocolError(f"{path}: is a link or no file; a model folder holds files alone")
        if path.is_file():
            yield path


def _linked(source: Path, target: Path, *, copy: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if copy:
            shutil.copyfile(source, target)
        else:
            os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)  # a file system without hard links


def _exchange(fresh: Path, target: Path) -> None:
    """Swap two folders in one step; where the system cannot, in two, which _restore completes."""
    if sys.platform == "linux":
        renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        names = os.fsencode(fresh), os.fsencode(target)
        if renameat2 is not None and not renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE):
            return
    away = _away(target)
    target.rename(away)
    fresh.rename(target)
    shutil.rmtree(away)


def _away(target: Path) -> Path:
    return target.with_name(f".{target.name}{MARK}-old")


def _restore(target: Path) -> None:
    """What a run that was killed left beside the target."""
    away, fresh = _away(target), target.with_name(f".{target.name}{MARK}")
    if away.exists() and not target.exists():
        away.rename(target)
    for left in (away, fresh):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)


def _sync(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
