"""Digests of files, bytes and arrays agree with hashlib."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from qalora_export.safety import HashedOnce, hashing, sha256_bytes, sha256_file


def test_equals_hashlib(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 100_000)
    expected = hashlib.sha256(b"abc" * 100_000).hexdigest()
    assert (
        sha256_file(path)
        == sha256_bytes(b"abc" * 100_000)
        == sha256_bytes(b"abc" * 50_000, b"abc" * 50_000)
        == expected
    )


def test_arrays_hash_by_their_c_order_bytes() -> None:
    array = np.arange(24).reshape(4, 6)
    for dtype in (np.uint8, np.float16, ml_dtypes.bfloat16, np.float32, np.bool_):
        values = array.astype(dtype)
        expected = hashlib.sha256(values.tobytes()).hexdigest()
        assert sha256_bytes(values) == sha256_bytes(np.asfortranarray(values)) == expected
    assert sha256_bytes(np.zeros((), np.float32)) == hashlib.sha256(b"\0" * 4).hexdigest()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file that is hashed, in order."""
    found: list[Path] = []
    monkeypatch.setattr(hashing, "sha256_file", lambda path: found.append(path) or sha256_file(path))
    return found


def test_a_file_is_read_once_by_whatever_name(tmp_path: Path, reads: list[Path]) -> None:
    path, hashed = tmp_path / "file", HashedOnce()
    path.write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    assert hashed(path) == hashed(tmp_path / "link") == hashed(tmp_path / ".." / tmp_path.name / "file")
    assert hashed.identity(path).sha256 == sha256_bytes(b"abc")
    assert reads == [path]


def overwritten(path: Path) -> None:
    """Other bytes in the same inode, of the same size, and the times that programs can set as they were."""
    before = path.stat()
    path.write_bytes(b"xyz")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def exchanged(path: Path) -> None:
    before = path.stat()
    path.with_name("other").write_bytes(b"xyz")
    os.utime(path.with_name("other"), ns=(before.st_atime_ns, before.st_mtime_ns))
    path.with_name("other").rename(path)


@pytest.mark.parametrize("change", [overwritten, exchanged])
def test_a_file_that_changed_is_read_again(change: Callable[[Path], None], tmp_path: Path) -> None:
    path, hashed = tmp_path / "file", HashedOnce()
    path.write_bytes(b"abc")
    before = hashed.identity(path)
    time.sleep(0.02)  # a tick of the file system's clock
    change(path)
    assert hashed(path) == sha256_bytes(b"xyz") != before.sha256
    assert hashed.identity(path) != before
