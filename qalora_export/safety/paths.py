"""No path that a file names may leave the folder of that file."""

import os
from pathlib import Path, PurePosixPath

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.safety.regular import regular_file

StrPath = str | os.PathLike[str]  # what every public function takes for a file or folder


def local_path(given: StrPath) -> Path:
    """A file or folder that a user named; `~` and `~name` are home folders.

    Raises InputError for a home folder that this machine does not have, for characters no file name can hold and for
    a link to itself.
    """
    path = Path(given)
    if "\0" in str(path):
        raise InputError("a path holds a NUL character", where=repr(str(path)), fix="check the path")
    try:
        path = path.expanduser()
    except RuntimeError as error:
        raise InputError("a path begins with an unknown user", where=path, why=str(error)) from error
    try:
        path.resolve()
    except RuntimeError as error:
        raise InputError("a path is a link to itself", where=path, fix="check the path") from error
    except (OSError, ValueError) as error:
        raise InputError("a path cannot be followed", where=path, why=str(error), fix="check the path") from error
    return path


def inside(folder: Path, name: str) -> Path:
    """The file `name` inside `folder`, checked.

    Raises UnsafeInputError for absolute paths, `..`, backslashes, NUL, symlinks and hard links; InputError when the
    file does not exist. The one link allowed is that of Hugging Face's own cache: snapshots/REV/file -> blobs/HASH.
    """
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name or ":" in name:
        raise UnsafeInputError("a file names a path outside its folder", where=f"{folder}: {name!r}")
    path = folder
    for part in pure.parts:
        path = path / part
        if path.is_symlink() and not _is_hub_blob(folder, path):
            raise UnsafeInputError("a model file is a symbolic link", where=path, fix="copy the real file there")
    regular_file(path, why=f"it is named in {folder}", fix="the download is incomplete")
    if path.stat().st_nlink > 1:
        raise UnsafeInputError("a model file is a hard link", where=path, fix="copy the real file there")
    return path


def _is_hub_blob(folder: Path, link: Path) -> bool:
    snapshots = folder.resolve().parent
    return snapshots.name == "snapshots" and link.resolve().parent == snapshots.parent / "blobs"
