"""sha256 of files and buffers, in constant memory."""

import hashlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK = 1 << 18  # stays in a core's cache


class Stopped(Exception):
    """A digest that nobody waits for any more."""


def sha256_file(path: Path, *, stop: threading.Event | None = None) -> str:
    """Hex digest of a file's bytes. Raises Stopped once `stop` is set."""
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            if stop is not None and stop.is_set():
                raise Stopped
            digest.update(view[:count])
    return digest.hexdigest()


HashFile = Callable[[Path], str]  # path -> hex digest of its bytes


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """The bytes of a file, and its place on the disk.

    A file that was replaced by another and put back differs here: in its inode or modification time, and where both
    were set back by hand in changed_ns, which no program can set.
    """

    sha256: str
    size: int
    modified_ns: int
    changed_ns: int
    inode: int


class HashedOnce:
    """sha256 of files, each read once for as long as its size, inode and times stay what they were.

    For many looks at one file within one run. It is no proof that a file stayed the same: hash it anew for that.
    """

    def __init__(self) -> None:
        self._known: dict[str, FileIdentity] = {}

    def __call__(self, path: Path) -> str:
        return self.identity(path).sha256

    def identity(self, path: Path) -> FileIdentity:
        """Digest and place of a file as they are now. A file that changes while it is read is read again next time."""
        name, now = os.path.realpath(path), path.stat()
        place = (now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino)
        known = self._known.get(name)
        if known is None or (known.size, known.modified_ns, known.changed_ns, known.inode) != place:
            known = self._known[name] = FileIdentity(sha256_file(path), *place)
        return known


def sha256_bytes(*buffers: bytes | NDArray[Any]) -> str:
    """Hex digest of the buffers one after the other; arrays by their C-order bytes."""
    digest = hashlib.sha256()
    for buffer in buffers:
        if isinstance(buffer, np.ndarray):
            digest.update(np.ascontiguousarray(buffer).reshape(-1).view(np.uint8).data)  # works for bfloat16 too
        else:
            digest.update(buffer)
    return digest.hexdigest()
