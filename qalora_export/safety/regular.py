"""Only regular files are read: a pipe may wait for ever, a device may never end, a folder has no bytes."""

from __future__ import annotations

import stat
from pathlib import Path

from qalora_export.errors import InputError

KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def regular_file(path: Path, what: str = "file", *, why: str = "", fix: str = "check the path") -> Path:
    """`path`, when it is a regular file or a link to one; every reader of inputs asks before it opens.

    what: the role of the file, for the message. Raises InputError when it is something else, a link that leads
    nowhere, or not there.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        if path.is_symlink():
            raise InputError(f"{what} is a link that leads nowhere", where=path, fix=fix) from error
        raise InputError(f"{what} not found", where=path, why=why, fix=fix) from error
    except ValueError as error:  # a NUL, half a surrogate pair
        raise InputError(f"{what} has a name that no file can have", where=path, why=str(error), fix=fix) from error
    except OSError as error:  # a link to itself, a name that is too long, a folder that may not be entered
        raise InputError(f"{what} cannot be read: {error.strerror}", where=path, why=why, fix=fix) from error
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in KINDS if test(mode)), "no regular file")
        raise InputError(f"{what} is {kind}, not a file", where=path, fix=fix)
    return path
