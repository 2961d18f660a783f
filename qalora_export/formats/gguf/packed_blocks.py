"""Rows of a packed matrix ↔ rows of GGUF blocks. 4-bit codes stay packed; others go by way of blocks.py.

blocks.py says what each format is and is the slow, obvious oracle of this module (tests compare byte for byte).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.formats.gguf.blocks import BLOCK_FORMATS, HALF, QK, check_group, implied_offset
from qalora_export.formats.gguf.nibbles import from_block_order, to_block_order
from qalora_export.grid import PackedAffine

# One block as a record; 16 opaque bytes move as one item, several times faster than as 16 items.
RECORDS = {
    "Q4_1": np.dtype([("d", "<u2"), ("m", "<u2"), ("qs", f"V{HALF}")]),
    "Q4_0": np.dtype([("d", "<u2"), ("qs", f"V{HALF}")]),
}


def encode(kind: str, matrix: PackedAffine) -> NDArray[np.uint8]:
    """Rows of blocks (out, in/32 · block bytes) uint8. Raises InputError for what the format cannot hold."""
    if kind not in RECORDS or matrix.bits != 4:
        return BLOCK_FORMATS[kind].encode(matrix.unpack())
    check_group(matrix.group_size, where=kind)
    blocks = np.empty((matrix.shape[0], matrix.shape[1] // QK), RECORDS[kind])
    blocks["d"] = _repeated(matrix.scale, matrix.group_size)
    if BLOCK_FORMATS[kind].zero is None:
        blocks["m"] = _repeated(matrix.offset, matrix.group_size)
    blocks["qs"] = to_block_order(matrix.codes).view(f"V{HALF}").reshape(blocks.shape)
    return blocks.view(np.uint8)


def decode(kind: str, rows: NDArray[np.uint8], *, bits: int, group_size: int) -> PackedAffine:
    """The inverse of encode; offset = −z·s where the zero is fixed. UnsafeInputError when rows contradict `bits`."""
    fmt = BLOCK_FORMATS[kind]
    if kind not in RECORDS or bits != 4:
        return PackedAffine.pack(fmt.decode(rows, bits=bits, group_size=group_size))
    check_group(group_size, where="qalora.modules")
    blocks = np.ascontiguousarray(rows).view(RECORDS[kind])
    scale = _grouped(blocks["d"], group_size, "scale")
    offset = _grouped(blocks["m"], group_size, "offset") if fmt.zero is None else implied_offset(scale, fmt.zero)
    qs = np.ascontiguousarray(blocks["qs"]).view(np.uint8).reshape(-1, HALF)
    codes = from_block_order(qs).reshape(rows.shape[0], -1)
    try:
        return PackedAffine(codes, scale, offset, bits, group_size)
    except InputError as error:
        raise UnsafeInputError(error.what, why="the blocks hold no canonical numbers") from error


def _repeated(values: NDArray[np.float16], group_size: int) -> NDArray[np.uint16]:
    """(out, in/g) -> one value per block (out, in/32)."""
    bits = values.view("<u2")
    return bits if group_size == QK else np.repeat(bits, group_size // QK, axis=1)


def _grouped(per_block: NDArray[np.uint16], group_size: int, what: str) -> NDArray[np.float16]:
    """One value per block (out, in/32) -> fp16 (out, in/g), after checking that a group's blocks agree."""
    span = group_size // QK
    if per_block.shape[1] % span:
        raise UnsafeInputError(f"{per_block.shape[1]} blocks do not divide into groups of {group_size}")
    groups = per_block.reshape(per_block.shape[0], -1, span)
    if not (groups == groups[..., :1]).all():
        raise UnsafeInputError(f"blocks of one group disagree about its {what}", why=f"declared group {group_size}")
    return np.ascontiguousarray(groups[..., 0]).view("<f2").astype(np.float16, copy=False)
