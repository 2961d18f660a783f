"""Large tensors in blocks of rows, prepared ahead by threads: time near that of a copy, memory that never grows.

numpy, hashlib and file writes let go of the interpreter lock, so encoding, hashing and writing overlap.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import mmap
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from numpy.typing import NDArray

BLOCK_BYTES = 2 << 20  # fits a core's cache together with its encoded form
WORKERS = 2
AHEAD = 8  # blocks prepared and not yet consumed
PIECE_BYTES = 1 << 18  # written at a time: longer writes have Linux look for contiguous memory, at times the CPU
SENT_BYTES = 1 << 27  # written between two syncs of a file that is still being written

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


def prepared(
    work: Callable[[Item], Result], items: Iterable[Item], *, ahead: int = AHEAD
) -> Generator[Result, None, None]:
    """map(work, items) in order, computed by WORKERS threads at most `ahead` items before they are asked for."""
    waiting: collections.deque[Future[Result]] = collections.deque()
    pool, wait = ThreadPoolExecutor(WORKERS), True
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except GeneratorExit:
        # Perhaps by the garbage collector, which may come while a thread is being started and holds the lock that
        # joining another one takes (threading._shutdown_locks_lock): waiting there would be for ever.
        wait = False
        raise
    finally:  # the consumer stopped or a block failed: what has not begun is not needed
        pool.shutdown(wait=wait, cancel_futures=True)


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
    """sha256 of consecutive blocks on a thread of its own, at most AHEAD of them behind the writer.

    Use as a context manager; `sha256` is known when it ends.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._waiting: collections.deque[Future[None]] = collections.deque()
        self._digest = hashlib.sha256()
        self.sha256 = ""

    def __enter__(self) -> BlockHasher:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        self.sha256 = self._digest.hexdigest()

    def update(self, block: bytes | memoryview) -> None:
        """The block must not change afterwards; it is kept until it has been hashed."""
        self._waiting.append(self._pool.submit(self._digest.update, block))
        if len(self._waiting) > AHEAD:
            self._waiting.popleft().result()


class HashedFile:
    """A new file that takes bytes in their order: threads hash them and send them to the disk while more are made.

    Use as a context manager; `sha256` is known when it ends. The digest is that of the bytes that were given: should
    the file ever hold others, its manifest tells.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._hasher, self._pool = BlockHasher(), ThreadPoolExecutor(1)
        self._syncing: Future[None] | None = None
        self._unsent, self.sha256 = 0, ""

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._hasher.__exit__()
        self._pool.shutdown()  # before the file is closed, whose number another file may get
        self._file.close()
        self._sent()
        self.sha256 = self._hasher.sha256

    def write(self, data: bytes | memoryview, /) -> None:
        """The bytes must not change afterwards."""
        block = memoryview(data).cast("B")
        self._hasher.update(block)
        for start in range(0, block.nbytes, PIECE_BYTES):
            self._file.write(block[start : start + PIECE_BYTES])
        self._unsent += block.nbytes
        if self._unsent >= SENT_BYTES and (self._syncing is None or self._syncing.done()):
            self._sent()
            self._syncing, self._unsent = self._pool.submit(os.fsync, self._file.fileno()), 0

    def tell(self) -> int:
        return self._file.tell()

    def _sent(self) -> None:
        """Raise what the last sync raised: the system tells of a lost write once."""
        if self._syncing is not None:
            self._syncing.result()


@contextlib.contextmanager
def synced(paths: Iterable[Path]) -> Iterator[None]:
    """While the block runs, send finished files to the disk: the final sync of safety.atomic finds little left to do.

    Errors surface when the block ends without one of its own.
    """
    with ThreadPoolExecutor(1) as pool:
        syncing = pool.submit(_sync, paths)
        yield
        syncing.result()


def _sync(paths: Iterable[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
