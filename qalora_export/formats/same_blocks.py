"""An embedding in blocks is a plain float32 tensor to readers; two of equal blocks are equal without their values."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from qalora_export.errors import QaloraError
from qalora_export.grid import PackedAffine, packed_difference


@runtime_checkable
class InBlocks(Protocol):
    """Contents that may hold a plain tensor in blocks."""

    def blocks(self, name: str, rows: slice) -> PackedAffine | None:
        """Some rows of it as these; None where it is not in blocks. Raises QaloraError where they hold no numbers."""


def same_blocks(left: object, name: str, right: object, other: str, rows: slice) -> bool:
    """Whether both hold those rows on one grid of super-blocks by equal codes, levels and steps.

    Only there: of float16 scales and offsets a block type may not store the offset, nor the sign of a zero with it.
    """
    if not (isinstance(left, InBlocks) and isinstance(right, InBlocks)):
        return False
    try:
        want, got = left.blocks(name, rows), right.blocks(other, rows)
    except QaloraError:  # what the runtime makes of them is compared
        return False
    if want is None or got is None or want.levels is None or got.levels is None:
        return False
    return want.grid == got.grid and packed_difference(want, got).total == 0
