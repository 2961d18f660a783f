"""Atomic output: written beside its final place, synced, then renamed. What exists is whole, and one writer's work.

Temporary names belong to one process, `.out.qalora-PID-RANDOM.partial`, and the lock of `out` (safety.lock) is held
from before the first byte to after the last rename. So whoever holds that lock may delete every temporary name of
`out`: its writer was killed.

Every file leaves with the permissions of an ordinary new file: some libraries (safetensors) make theirs readable for
the owner alone, and another user, who deploys the model, could not read it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError

from qalora_export.errors import InputError
from qalora_export.safety.lock import LOCK, OWNER, is_held, locked, place_of, single_writer, try_lock

# How safetensors' and torch's own writers, which raise no OSError, report what the system refused.
_FOREIGN = re.compile(r"I/O error|os error \d+|PytorchStreamWriter|inline_container")
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.qalora-\d+-[0-9a-f]{8}(?P<replaced>\.replaced)?\.partial", re.DOTALL)
_LOCK_FILE = re.compile(rf"\.(?P<name>.+)({re.escape(LOCK)}|{re.escape(OWNER)})", re.DOTALL)
_guards: dict[Path, Callable[[Path], None]] = {}  # what may be replaced, by output
_touched: set[Path] = set()  # folders in which this process wrote or tried to
_made: list[Path] = []  # folders that it made for its outputs


def refuse_existing(target: Path, *, force: bool) -> None:
    """Raise InputError when `target` exists and `force` is off. A dangling symlink counts as existing."""
    if not force and (target.exists() or target.is_symlink()):
        raise InputError("the output exists already", where=target, fix="choose another path or pass --force")


def _refuse_replacing(target: Path, *, force: bool) -> None:
    """Just before a rename: hours may lie between the checks of a stage's start and its end."""
    refuse_existing(target, force=force)
    if force and (guard := _guards.get(place_of(target))):
        guard(target)


@contextlib.contextmanager
def exclusive(target: Path, guard: Callable[[Path], None] | None = None) -> Iterator[None]:
    """Be the one writer of `target` while the block runs; may be nested. guard: raises for what must not be replaced.

    Missing parent folders are made, and go again when nothing was put into them. What killed writers left under
    temporary names in its folder is removed, and an output that one had moved aside is put back.
    """
    with contextlib.ExitStack() as stack:
        with could_not_write(target):
            stack.callback(_remove_empty, _make_folders(target.parent))
            _touched.add(target.parent.absolute())
            if stack.enter_context(single_writer(target)):
                _clean(place_of(target))
                sweep(target.parent)
            if guard is not None:
                _guards[place_of(target)] = guard
                stack.callback(_guards.pop, place_of(target), None)
        yield


@contextlib.contextmanager
def atomic_file(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success sync it and rename it to `target`, else delete it.

    The file's mode becomes 0666 without the umask. Raises InputError when `target` exists (unless `force`) or has
    another writer.
    """
    with exclusive(target), could_not_write(target):
        refuse_existing(target, force=force)
        temporary = _temporary(target)
        try:
            yield temporary
            _sync(temporary, mode=_ordinary_mode(_temporary(target)))
            _refuse_replacing(target, force=force)
            temporary.replace(target)
            _sync(target.parent)
        finally:
            _remove(temporary)


@contextlib.contextmanager
def atomic_files(targets: Sequence[Path], *, force: bool = False) -> Iterator[list[Path]]:
    """Files that are one output: yield a temporary path beside each, sync all, then rename them in this order.

    What ends the renames half way, a signal say, takes back those that replaced nothing. Errors as in atomic_file.
    """
    with contextlib.ExitStack() as stack:
        for target in targets:
            stack.enter_context(exclusive(target))
        stack.enter_context(could_not_write(targets[0]))
        for target in targets:
            refuse_existing(target, force=force)
        temporaries, renamed = [_temporary(target) for target in targets], list[Path]()
        try:
            yield temporaries
            for target, temporary in zip(targets, temporaries, strict=True):
                _sync(temporary, mode=_ordinary_mode(_temporary(target)))
                _refuse_replacing(target, force=force)
            for target, temporary in zip(targets, temporaries, strict=True):
                if not (target.exists() or target.is_symlink()):
                    renamed.append(target)
                temporary.replace(target)
            for folder in {target.parent for target in targets}:
                _sync(folder)
            renamed.clear()
        finally:
            for path in (*temporaries, *renamed):
                _remove(path)


@contextlib.contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Yield a folder beside `target`, the output that this process is writing, for the time of the block."""
    with exclusive(target), could_not_write(target):
        temporary = _temporary(target)
        try:
            temporary.mkdir()
            yield temporary
        finally:
            _remove(temporary)


@contextlib.contextmanager
def atomic_directory(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; on success sync every file and rename the folder into place.

    With `force` an existing target is moved aside first and deleted after the rename, so at no moment does a half
    written folder stand under the final name. One that a kill left aside, between the two renames, is put back by the
    next writer. The mode of every file becomes 0666 without the umask; folders keep theirs. Errors as in atomic_file.
    """
    with exclusive(target), could_not_write(target):
        refuse_existing(target, force=force)
        temporary = _temporary(target)
        replaced = temporary.with_suffix(".replaced.partial")
        try:
            temporary.mkdir()
            yield temporary
            mode = _ordinary_mode(temporary / ".mode.partial")
            for path in sorted(temporary.rglob("*")):
                _sync(path, mode=mode)
            _sync(temporary)
            _refuse_replacing(target, force=force)
            if target.exists() or target.is_symlink():
                target.rename(replaced)
            temporary.rename(target)
            _sync(target.parent)
        finally:
            _remove(temporary)
            _put_back_or_remove(replaced, target)


def abandon() -> None:
    """Remove everything unfinished of this process, which ends now; from any thread, whatever the others are doing.

    What a signal interrupted between making a name and noting it is found by the name itself.
    """
    for place, release in locked().items():
        for _ in range(3):  # another thread may be filling the folder that is being removed, or removing it too
            with contextlib.suppress(OSError):
                _clean(place)
        with contextlib.suppress(OSError):
            release()
    for folder in _touched:
        with contextlib.suppress(OSError):
            sweep(folder)
    _remove_empty(_made[::-1])


def sweep(folder: Path) -> None:
    """Delete what killed writers left under temporary names in `folder`; what a living one has there is its own."""
    names = {found["name"] for path in folder.iterdir() if (found := _ours(path.name))}
    for place in (place_of(folder / name) for name in names):
        if is_held(place):
            continue
        with contextlib.suppress(OSError):  # of another user, who may still clean up
            if (release := try_lock(place)) is not None:
                try:
                    _clean(place)
                finally:
                    release()


def _ours(name: str) -> re.Match[str] | None:
    return _TEMPORARY.fullmatch(name) or _LOCK_FILE.fullmatch(name)


def _clean(place: Path) -> None:
    """Remove the temporary names of `place`, whose lock is held."""
    for path in place.parent.iterdir():
        found = _TEMPORARY.fullmatch(path.name)
        if found is None or found["name"] != place.name:
            continue
        if found["replaced"]:
            _put_back_or_remove(path, place)
        else:
            _remove(path)


def _put_back_or_remove(replaced: Path, target: Path) -> None:
    if replaced.exists() and not target.exists() and not target.is_symlink():
        replaced.rename(target)
    else:
        _remove(replaced)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.qalora-{os.getpid()}-{os.urandom(4).hex()}.partial")


def _make_folders(folder: Path) -> list[Path]:
    """Make `folder` and its parents; those that were missing, the innermost first."""
    missing = []
    for path in (folder, *folder.parents):
        if path.exists():
            break
        missing.append(path)
    if missing:
        _made.extend(reversed(missing))
        folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


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
