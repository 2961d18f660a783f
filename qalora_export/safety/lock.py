"""One writer per output. The lock belongs to the process, so a kill releases it and nothing has to be cleaned up.

The lock of `out` is flock on `.out.qalora-lock` beside it; the file goes when the writer ends. Where the file system
has no flock (some network and FUSE mounts) `.out.qalora-owner` is created exclusively and names its process: it is
stale when that process is gone, which only its own machine can tell.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from pathlib import Path

from qalora_export.errors import InputError

LOCK, OWNER = ".qalora-lock", ".qalora-owner"
NO_FLOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}

Release = Callable[[], None]
# Outputs that the code running now has claimed already: a stage claims its output, its writer claims it again.
_held: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())
_locked: dict[Path, Release] = {}  # by this process, whichever of its threads


@contextlib.contextmanager
def single_writer(target: Path) -> Iterator[bool]:
    """Hold the lock of `target` (a file or folder, there or not) while the block runs; its parent must exist.

    Yields whether this is the outermost claim. Raises InputError at once when another process or thread holds it.
    """
    place = place_of(target)
    if place in _held.get():
        yield False
        return
    release = try_lock(place)
    if release is None:
        raise InputError(
            "another command is writing this output",
            where=target,
            why=_who(place),
            fix="wait until it has ended, or choose another output",
        )
    _held.set(_held.get() | {place})
    try:
        yield True
    finally:
        _held.set(_held.get() - {place})
        release()


def place_of(target: Path) -> Path:
    """One name for one output, however the path to its folder is spelled; a link of that name is not followed."""
    return target.parent.resolve() / target.name


def is_held(place: Path) -> bool:
    return place in _held.get()


def locked() -> dict[Path, Release]:
    """The outputs that this process owns now, and how to let go of each: for a process that is about to end."""
    return dict(_locked)


def try_lock(place: Path) -> Release | None:
    """Take the lock of `place` and return how to let go of it; None when somebody else has it."""
    path = place.with_name(f".{place.name}{LOCK}")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                return _noted(place, partial(_let_go, descriptor, path))
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in NO_FLOCK:
                raise
            path.unlink(missing_ok=True)
            return _own(place)
        except BaseException:  # a signal; a lock that nobody can let go of would stay as long as the process
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder ended between our open and our lock, and took the file away


def _noted(place: Path, let_go: Release) -> Release:
    def release() -> None:
        let_go()
        _locked.pop(place, None)

    _locked[place] = release
    return release


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _let_go(descriptor: int, path: Path) -> None:
    if _is_at(descriptor, path):  # not so when a signal interrupted the same thing just before its end
        path.unlink(missing_ok=True)  # while it is locked: whoever waits for it finds out and makes a new one
    os.close(descriptor)


def _own(place: Path) -> Release | None:
    """The lock without flock: a file that only one process can create."""
    path = place.with_name(f".{place.name}{OWNER}")
    mine = json.dumps(_identity(os.getpid()))
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            if not _take_away(path):
                return None
            continue
        with os.fdopen(descriptor, "w") as file:
            file.write(mine)
        return _noted(place, partial(path.unlink, missing_ok=True))


def _take_away(path: Path) -> bool:
    """Remove the file of a process that has ended. False when it may still run."""
    found = _read(path)
    if found is None:
        return True
    if _may_run(found):
        return False
    aside = path.with_name(f"{path.name}-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return True
    # Somebody may have taken the stale file away and made a new one in between: that one goes back.
    if (stale := _read(aside) == found) is False:
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink()
    return stale


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _identity(process: int) -> dict[str, object]:
    """What tells a process from every other: machine since its last start, process namespace, number, start time."""
    return {"host": socket.gethostname(), "system": _system(), "pid": process, "started": _started(process)}


def _system() -> str:
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return ""


def _started(process: int) -> str:
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def _may_run(record: str) -> bool:
    """Whether the process of an owner file may still be there; what another machine wrote cannot be judged here."""
    try:
        content = json.loads(record)
        process = int(content["pid"])
        if (content["host"], content["system"]) != (socket.gethostname(), _system()):
            return True
        os.kill(process, 0)
    except (ValueError, KeyError, TypeError):
        return True  # being written, or not ours
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return bool(content.get("started") == _started(process))


def _who(place: Path) -> str:
    path = place.with_name(f".{place.name}{OWNER}")
    record = _read(path)
    return "" if record is None else f"{path} says {record}; delete it if that process has ended"
