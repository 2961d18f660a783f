"""An embedding in blocks as ONNX holds it: its codes, gathered and dequantized row by row, every value as it was.

    rows = GatherBlockQuantized(codes, ids, scale, zero points)      s·(q − z)      (batch, sequence, in)
    rows += Gather(remainder, ids), one number for each group        R = m + z·s

GatherBlockQuantized (com.microsoft, ContribOperators.md) takes codes of 4 and 8 bits in bytes, as MatMulNBits packs
them, and computes float(q − z)·s in float32. That product is exact and so is R (split_form.py): the one rounding is
that of the sum, as in the checkpoint. What is left is the sign of zero: beside R a group whose scale is 0 has z = 0, so
that its values are 0·q + m as they are there; and where R is 0 everywhere it is still added, unless all scales are
above 0, to make +0 of the kernel's −0.

An embedding in nibbles that is lm_head too stays float32; for one in bytes see tied_head.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import UnsafeInputError
from qalora_export.formats.onnx.split_form import SplitForm, choose_form
from qalora_export.grid import PackedAffine, SymmetricGrid, pack_codes, unpack_codes

TIED_BITS = 8  # elements of an embedding that may be lm_head too
ELEMENT_BITS = {2: 4, 3: 4, 4: 4, 5: 8, 6: 8, 8: 8}  # code bits -> bits of one element; 2 are too new for some runtimes


def embedding_form(matrix: PackedAffine, *, where: str) -> SplitForm:
    """z and R of an embedding whose values are canonical.values_of. Errors as of choose_form."""
    form = choose_form(matrix.bits, matrix.scale, matrix.offset, where=where)
    form = dataclasses.replace(form, container=ELEMENT_BITS[matrix.bits])
    if isinstance(matrix.grid, SymmetricGrid):
        return form  # its values are s·(q − z), as the kernel has them
    if form.remainder is not None:
        form.zero[matrix.scale == 0] = 0
        return form
    if (matrix.scale > 0).all():
        return form
    return dataclasses.replace(form, remainder=np.zeros(form.zero.shape, np.float16))


def element_codes(matrix: PackedAffine) -> NDArray[np.uint8]:
    """Codes as GatherBlockQuantized reads them, uint8 (out, in·element bits/8)."""
    bits = ELEMENT_BITS[matrix.bits]
    return matrix.codes if bits == matrix.bits else pack_codes(unpack_codes(matrix.codes, matrix.bits), bits)


@dataclass(frozen=True, slots=True)
class GatheredBlocks:
    """What a file must hold of an embedding: bits of an element, in-features of a group, groups of a row."""

    element_bits: int
    group_size: int
    groups: int
    where: str

    def check(self, said: Mapping[str, int], codes: NDArray[Any], numbers: Sequence[NDArray[Any]]) -> None:
        """said: attributes of the node; numbers: scale and remainder. Raises UnsafeInputError for others."""
        if said != {"bits": self.element_bits, "block_size": self.group_size, "gather_axis": 0, "quantize_axis": 1}:
            raise UnsafeInputError(
                f"GatherBlockQuantized says {dict(said)}, not blocks of {self.group_size}", where=self.where
            )
        width = self.groups * self.group_size * self.element_bits // 8
        if codes.dtype != np.uint8 or codes.shape[1:] != (width,):
            raise UnsafeInputError(f"codes are {codes.dtype}{codes.shape}, not bytes {width} wide", where=self.where)
        for found in numbers:
            if found.dtype not in (np.float16, np.float32) or found.shape != (len(codes), self.groups):
                raise UnsafeInputError(
                    f"a scale or remainder is {found.dtype}{found.shape}, codes are {codes.shape}", where=self.where
                )


def gathered_values(
    codes: NDArray[np.uint8], zero: NDArray[np.uint8], scale: NDArray[Any], remainder: NDArray[Any] | None = None
) -> NDArray[np.float32]:
    """What the graph computes, float32 (rows, in): codes uint8 (rows, in), the others (rows, in/g)."""
    groups = codes.reshape(*scale.shape, -1).astype(np.float32)
    values: NDArray[np.float32] = (groups - zero[..., None].astype(np.float32)) * scale[..., None].astype(np.float32)
    if remainder is not None:
        values += remainder[..., None].astype(np.float32)
    return values.reshape(codes.shape)
