"""Answers that are kept between runs: PyTorch's for a checkpoint.

They depend on nothing but bytes of files, token ids, the number of threads, our code, the packages they pass through
and the CPU. All of that is in the key, so the same question has the same answer, to the bit. What an artifact under
verification computes is never kept: that is what a run asks.

An entry is one file, `KEY.DIGEST.npz` (no pickle; its parts are checked as a runner's answer is). DIGEST is the sha256
of the file, and the file repeats what the key was made of: an entry that is damaged, cut short or under another's name
is deleted and computed anew.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qalora_runtimes.arrays import ProtocolError, read_arrays, write_arrays

from qalora_export.installed import code_version, kernels, package_version
from qalora_export.safety import HashedOnce, local_path, sha256_bytes, sha256_file
from qalora_export.verify.identity import identities

Arrays = dict[str, NDArray[Any]]
FOLDER = "QALORA_CACHE"  # environment: where; empty means nowhere
LIMIT = 4 << 30  # bytes of all entries; 1,000 positions of a vocabulary of 128k are 0.5 GB
OVERHEAD = 4096  # bytes of names and headers in an entry, at most
QUESTION = "question"  # the array that repeats the key's content
STALE = 24 * 3600.0  # seconds after which an unfinished file belongs to a process that was killed
# Variables by which torch, its libraries and the runtimes choose kernels and threads.
VARIABLES = ("ATEN", "DNNL", "GGML", "GOMP", "KMP", "LLAMA", "MKL", "OMP", "ONEDNN", "OPENBLAS", "ORT", "TORCH")

logger = logging.getLogger(__name__)


@dataclass
class Store:
    """A folder of entries, at most `limit` bytes; the longest unused go first.

    hashed: what this run has hashed, so that a checkpoint is not read again for its key. answered: what came from here.
    """

    folder: Path
    hashed: HashedOnce = field(default_factory=HashedOnce)
    limit: int = LIMIT
    answered: list[str] = field(default_factory=list)

    def arrays(
        self, what: str, compute: Callable[[], Arrays], *, of: Path, packages: tuple[str, ...], **asked: Any
    ) -> Arrays:
        """compute(), or what it answered before. of: the file or folder it reads. asked: everything else it depends on,
        as JSON's own types.

        Nothing is kept where `of` has changed meanwhile, or where the folder cannot be written.
        """
        question = self._question(what, of, packages, asked)
        found = self._read(question)
        if found is not None:
            self.answered.append(what)
            return found
        found = compute()
        if self._question(what, of, packages, asked) == question:
            self._write(question, found)
        return found

    def _question(self, what: str, of: Path, packages: tuple[str, ...], asked: Mapping[str, Any]) -> bytes:
        content = {
            "what": what,
            "asked": asked,
            "of": [
                (path.relative_to(of).as_posix(), file.sha256)
                for path, file in identities(of, hashed=self.hashed).items()
            ],
            "code": code_version(),
            "python": platform.python_version(),
            "packages": {name: package_version(name) for name in packages},
            "cpu": kernels(),
            "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith(VARIABLES)},
        }
        return json.dumps(content, sort_keys=True).encode()

    def _read(self, question: bytes) -> Arrays | None:
        if not self._is_ours():
            return None
        for path in self.folder.glob(f"{sha256_bytes(question)}.*.npz"):
            try:
                arrays = self._opened(path, question)
                os.utime(path)  # used now
            except (OSError, ProtocolError) as error:
                logger.warning("a kept answer is damaged and is computed anew: %s", error)
                _remove(path)
            else:
                return arrays
        return None

    def _opened(self, path: Path, question: bytes) -> Arrays:
        if path.name.split(".")[1] != sha256_file(path):
            raise ProtocolError(f"{path}: the bytes are not those that were written")
        arrays: Arrays = read_arrays(path, required={QUESTION}, optional=set(ANSWERS))
        if arrays.pop(QUESTION).tobytes() != question:
            raise ProtocolError(f"{path}: the answer to another question")
        return arrays

    def _write(self, question: bytes, arrays: Arrays) -> None:
        nbytes = len(question) + sum(array.nbytes for array in arrays.values()) + OVERHEAD
        if nbytes > self.limit:
            return
        partial = self.folder / f".{secrets.token_hex(8)}.npz"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._is_ours():
                return
            self._make_room(nbytes)
            write_arrays(partial, {QUESTION: np.frombuffer(question, np.uint8), **arrays})
            partial.replace(self.folder / f"{sha256_bytes(question)}.{sha256_file(partial)}.npz")
        except OSError as error:
            logger.warning("nothing is kept in %s: %s", self.folder, error)
        finally:
            for path in (partial, partial.with_name(f"{partial.name}.partial")):
                _remove(path)

    def _is_ours(self) -> bool:
        """Whether the folder is there and nobody else could have put an answer into it."""
        if not self.folder.is_dir():
            return False
        if not hasattr(os, "geteuid"):
            return True  # no such notion: the folder lies in the user's profile
        stat = self.folder.stat()
        if stat.st_uid == os.geteuid() and not stat.st_mode & 0o022:
            return True
        logger.warning("%s is not used: others can write there", self.folder)
        return False

    def _make_room(self, needed: int) -> None:
        files = [(path.stat(), path) for path in self.folder.iterdir() if path.is_file()]
        left = sum(stat.st_size for stat, _ in files)
        for stat, path in sorted(files, key=lambda file: file[0].st_mtime):
            unfinished = path.name.startswith(".")
            stale = unfinished and time.time() - stat.st_mtime > STALE
            if stale or (left + needed > self.limit and not unfinished):
                _remove(path)
                left -= stat.st_size


ANSWERS = ("logprobs", "decoded", "deviations", "frequencies", "noise", "right")
_CURRENT: ContextVar[Store | None] = ContextVar("store", default=None)


def opened(hashed: HashedOnce) -> Store | None:
    """The user's store: $QALORA_CACHE, else qalora-export/ in the user's cache folder; None when that is empty."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.environ.get(FOLDER, f"{home}/qalora-export")
    return Store(local_path(folder) / "verify", hashed) if folder else None


@contextmanager
def kept_in(store: Store | None) -> Iterator[None]:
    """Inside the block `remembered` asks this store."""
    token = _CURRENT.set(store)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def remembered(
    what: str, compute: Callable[[], Arrays], *, of: Path, packages: tuple[str, ...], **asked: Any
) -> Arrays:
    """Store.arrays of the store of this run, or compute() where there is none."""
    store = _CURRENT.get()
    return compute() if store is None else store.arrays(what, compute, of=of, packages=packages, **asked)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
