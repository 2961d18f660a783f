"""sha256 of files and buffers, in constant memory."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_bytes(*buffers: bytes | NDArray[Any]) -> str:
    """Hex digest of the buffers one after the other; arrays by their C-order bytes."""
    digest = hashlib.sha256()
    for buffer in buffers:
        if isinstance(buffer, np.ndarray):
            digest.update(np.ascontiguousarray(buffer).reshape(-1).view(np.uint8).data)  # works for bfloat16 too
        else:
            digest.update(buffer)
    return digest.hexdigest()
