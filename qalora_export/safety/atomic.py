"""Atomic output: written beside its final place, synced, then renamed. What exists is whole.

Every file leaves with the permissions of an ordinary new file: some libraries (safetensors) make theirs readable for
the owner alone, and another user, who deploys the model, could not read it.
"""

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from qalora_export.errors import InputError

# How safetensors' and torch's own writers, which raise no OSError, report what the system refused.
_FOREIGN = re.compile(r"I/O error|os error \d+|PytorchStreamWriter|inline_container")


def refuse_existing(target: Path, *, force: bool) -> None:
    """Raise InputError when `target` exists and `force` is off. A dangling symlink counts as existing."""
    if not force and (target.exists() or target.is_symlink()):
        raise InputError("the output exists already", where=target, fix="choose another path or pass --force")


@contextlib.contextmanager
def atomic_file(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success sync it and rename it to `target`, else delete it.

    The file's mode becomes 0666 without the umask.
    """
    refuse_existing(target, force=force)
    with could_not_write(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.partial")
        _remove(temporary)
        try:
            yield temporary
            _sync(temporary, mode=_ordinary_mode(target.with_name(f".{target.name}.mode.partial")))
            temporary.replace(target)
            _sync(target.parent)
        finally:
            _remove(temporary)


@contextlib.contextmanager
def atomic_directory(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; on success sync every file and rename the folder into place.

    With `force` an existing target is moved aside first and deleted after the rename, so at no moment does a half
    written folder stand under the final name. One that a kill left aside, between the two renames, is put back.
    The mode of every file becomes 0666 without the umask; folders keep theirs.
    """
    temporary = target.with_name(f".{target.name}.partial")
    replaced = target.with_name(f".{target.name}.replaced.partial")
    with could_not_write(target):
        if replaced.exists() and not target.exists():
            replaced.rename(target)
    refuse_existing(target, force=force)
    with could_not_write(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        _remove(replaced)
        temporary.mkdir()
        try:
            yield temporary
            mode = _ordinary_mode(temporary / ".mode.partial")
            for path in sorted(temporary.rglob("*")):
                _sync(path, mode=mode)
            _sync(temporary)
            if target.exists() or target.is_symlink():
                target.rename(replaced)
            temporary.rename(target)
            _sync(target.parent)
        finally:
            _remove(temporary)
            _remove(replaced)


def sweep(folder: Path) -> None:
    """Delete what killed runs left under temporary names in `folder`."""
    for path in folder.glob(".*.partial"):
        _remove(path)


@contextlib.contextmanager
def could_not_write(target: Path) -> Iterator[None]:
    """Turn the system's errors inside the block into one InputError that names the file."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and error.filename and str(target) not in str(error.filename):
            raise
        raise _refused(error.strerror or str(error), error.filename or target) from error
    except Exception as error:
        if not (isinstance(error, SafetensorError) or type(error) is RuntimeError) or not _FOREIGN.search(str(error)):
            raise
        raise _refused(str(error).partition("\n")[0], target) from error


def _refused(reason: str, where: object) -> InputError:
    return InputError(
        f"could not write: {reason}",
        where=where,
        why="nothing was left behind under the final name",
        fix="free disk space or check the folder's permissions, then run the command again",
    )


def _ordinary_mode(probe: Path) -> int:
    """Permissions of a new file, 0666 without the umask, seen on an empty file that is made at `probe` and deleted.

    The umask itself can be read only by setting it, for a moment and for every thread of the process.
    """
    _remove(probe)
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        _remove(probe)


def _sync(path: Path, *, mode: int | None = None) -> None:
    """Send a file or folder to the disk. mode: permissions for a regular file; what a link points to keeps its own."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        found = os.fstat(descriptor).st_mode
        if mode is not None and stat.S_ISREG(found) and stat.S_IMODE(found) != mode and not path.is_symlink():
            os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
