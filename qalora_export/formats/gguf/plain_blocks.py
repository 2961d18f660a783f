"""An embedding whose numbers are those of Q8_0 blocks: it goes into GGUF as the blocks it came from.

Embeddings are not quantized here and stay what they are, bit for bit. One that was read from a Q8_0 tensor is float32
in the checkpoint, and each of its values is d·q with a float16 d for 32 columns and an int8 q. llama.cpp makes such a
block from its largest value, which gets q = ±127, so d is that value over 127, exactly. Where this gives every value
back, bit for bit, the blocks are written: a quarter of the bytes, the same numbers. Any other embedding is left alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.formats.contents import EMBEDDING
from qalora_export.formats.gguf.types import Q8_0, QK
from qalora_export.formats.streaming import release, row_blocks
from qalora_export.grid import PackedAffine, implied_offset

LARGEST = np.float32(127)
F32 = np.dtype(np.float32)


def lies_on_blocks(folder: ModelFolder, name: str) -> bool:
    """Whether a tensor that is not quantized is an embedding all of whose rows are Q8_0 blocks already."""
    entry = folder.entry(name)
    if name != EMBEDDING or entry.dtype != F32 or len(entry.shape) != 2 or entry.shape[1] % QK:
        return False
    tensor = folder.tensor(name)
    for rows in row_blocks(entry.shape[0], entry.nbytes):
        if not _exact(tensor[rows]):
            return False
        release(tensor[rows])
    return True


def blocks_of(values: NDArray[Any]) -> NDArray[np.uint8]:
    """float32 (rows, in) that lie on blocks -> bytes of Q8_0 blocks (rows, in/32 · 34)."""
    codes, d = _codes(values)
    scale = d[..., 0].astype(np.float16)
    unsigned = (codes.astype(np.int16) + 128).astype(np.uint8).reshape(values.shape)
    return Q8_0.pack(PackedAffine(unsigned, scale, implied_offset(scale, 128), 8, QK))


def _exact(values: NDArray[Any]) -> bool:
    codes, d = _codes(values)
    back = codes.astype(np.float32) * d
    same = back.view(np.uint32) == np.ascontiguousarray(values).reshape(back.shape).view(np.uint32)
    return bool(same.all()) and bool((d * np.float32(128) <= np.finfo(np.float16).max).all())


def _codes(values: NDArray[Any]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """int8 codes (rows, in/32, 32) and d (rows, in/32, 1), a float16 number as float32; meaningless where not exact."""
    blocks = np.asarray(values).reshape(len(values), -1, QK)
    with np.errstate(over="ignore", invalid="ignore"):
        d = (np.abs(blocks).max(axis=-1, keepdims=True) / LARGEST).astype(np.float16).astype(np.float32)
        d[~np.isfinite(d)] = 0
        # Where d is 0, having underflowed, a negative code is still −0.
        codes = np.divide(blocks, d, out=-np.signbit(blocks).astype(np.float32), where=d != 0)
        return np.rint(codes).clip(-LARGEST, LARGEST).astype(np.int8), d
