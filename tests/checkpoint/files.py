"""safetensors files written byte by byte from the format's own description, right and wrong ones; equal tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


def raw_file(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """u64 header length, header, data. `header`: JSON value or raw bytes; `length` overrides the honest one."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def same_bytes(left: np.ndarray, right: np.ndarray) -> bool:
    """Equal shape, dtype and bytes."""
    return left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes()
