"""Digests of files, bytes and arrays agree with hashlib."""

import hashlib
from pathlib import Path

import ml_dtypes
import numpy as np

from qalora_export.safety import sha256_bytes, sha256_file


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
