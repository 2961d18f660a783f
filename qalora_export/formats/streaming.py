"""Large tensors in blocks of rows, prepared ahead by threads: time near that of a copy, memory that never grows.

numpy, hashlib and file writes let go of the interpreter lock, so encoding, hashing and writing overlap.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from qalora_export.safety import sha256_file

BLOCK_BYTES = 2 << 20  # fits a core's cache together with its encoded form
WORKERS = 2
AHEAD = 8  # blocks prepared and not yet consumed

Item = TypeVar("Item")
Result = TypeVar("Result")


class Sink(Protocol):
    """Where an export's bytes go, one after the other: a file, or a hash of what the file would hold."""

    def write(self, data: bytes | memoryview, /) -> object: ...
    def tell(self) -> int: ...


class HashSink:
    """sha256 of everything written; nothing is kept."""

    def __init__(self) -> None:
        self._digest, self._size = hashlib.sha256(), 0

    def write(self, data: bytes | memoryview, /) -> None:
        self._digest.update(data)
        self._size += len(data) if isinstance(data, bytes) else data.nbytes

    def tell(self) -> int:
        return self._size

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def row_blocks(rows: int, nbytes: int, block_bytes: int = BLOCK_BYTES) -> Iterator[slice]:
    """Slices that cover `rows` rows of a tensor of `nbytes` bytes, each about `block_bytes`."""
    step = max(1, block_bytes * rows // max(nbytes, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def prepared(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """map(work, items) in order, computed by WORKERS threads at most AHEAD items before they are asked for."""
    waiting: collections.deque[Future[Result]] = collections.deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # the consumer stopped or a block failed: what has not begun is not needed
            for future in waiting:
                future.cancel()


def release(array: NDArray[Any]) -> None:
    """Give the resident pages of a memory-mapped array back to the page cache; other arrays are left alone.

    The data stays valid: a page that is touched again is mapped again. Without this the pages of a mapped file count
    as the process's memory until the mapping is closed.
    """
    base: object = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


class BlockHasher:
    """sha256 of consecutive tensors on a thread of its own, at most AHEAD blocks behind the writer.

    Use as a context manager; the futures that `finish` returns are done when it ends.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._waiting: collections.deque[Future[None]] = collections.deque()
        self._digest = hashlib.sha256()

    def __enter__(self) -> BlockHasher:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def update(self, block: NDArray[np.uint8]) -> None:
        """The block must not change afterwards; it is kept until it has been hashed."""
        self._waiting.append(self._pool.submit(self._digest.update, block.data))
        if len(self._waiting) > AHEAD:
            self._waiting.popleft().result()

    def finish(self) -> Future[str]:
        """Hex digest of the tensor whose last block was given; the next block begins another one."""
        answer = self._pool.submit(self._digest.hexdigest)
        self._digest = hashlib.sha256()
        return answer


@contextlib.contextmanager
def finished(files: Mapping[str, Path]) -> Iterator[dict[str, str]]:
    """While the block runs, send finished files to the disk and hash them; when it ends the digests are in the dict.

    files: name -> path. The final sync of safety.atomic then finds little left to do. Errors surface when the block
    ends without one of its own.
    """
    digests: dict[str, str] = {}
    with ThreadPoolExecutor(2) as pool:
        syncing = pool.submit(_sync, files.values())
        hashing = pool.submit(lambda: {name: sha256_file(path) for name, path in files.items()})
        yield digests
        digests |= hashing.result()
        syncing.result()


def _sync(paths: Iterable[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
