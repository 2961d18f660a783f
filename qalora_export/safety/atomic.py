"""Atomic output: written beside its final place, synced, then renamed. What exists is whole."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from qalora_export.errors import InputError


def refuse_existing(target: Path, *, force: bool) -> None:
    """Raise InputError when `target` exists and `force` is off. A dangling symlink counts as existing."""
    if not force and (target.exists() or target.is_symlink()):
        raise InputError("the output exists already", where=target, fix="choose another path or pass --force")


@contextlib.contextmanager
def atomic_file(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success sync it and rename it to `target`, else delete it."""
    refuse_existing(target, force=force)
    with _os_errors_as_input(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.partial")
        _remove(temporary)
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(target)
            _sync(target.parent)
        finally:
            _remove(temporary)


@contextlib.contextmanager
def atomic_directory(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; on success sync every file and rename the folder into place.

    With `force` an existing target is moved aside first and deleted after the rename, so at no moment does a half
    written folder stand under the final name.
    """
    refuse_existing(target, force=force)
    with _os_errors_as_input(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.partial")
        replaced = target.with_name(f".{target.name}.replaced.partial")
        _remove(temporary)
        _remove(replaced)
        temporary.mkdir()
        try:
            yield temporary
            for path in sorted(temporary.rglob("*")):
                _sync(path)
            _sync(temporary)
            if target.exists() or target.is_symlink():
                target.rename(replaced)
            temporary.rename(target)
            _sync(target.parent)
        finally:
            _remove(temporary)
            _remove(replaced)


@contextlib.contextmanager
def _os_errors_as_input(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and error.filename and str(target) not in str(error.filename):
            raise
        raise InputError(
            f"could not write: {error.strerror or error}",
            where=error.filename or target,
            why="nothing was left behind under the final name",
            fix="free disk space or check the folder's permissions, then run the same command again",
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
