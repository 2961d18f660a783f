"""Row order of q and k: Transformers rotates halves of a head, llama.cpp rotates neighbouring pairs.

Within each head row i of the first half and row i of the second half become neighbours. Rows are whole, so groups
along in-features are untouched: codes, scale, offset and bias change places together and no value changes.
Source: llama.cpp conversion, LlamaModel.permute.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import InputError


def row_order(rows: int, heads: int) -> NDArray[np.intp]:
    """(rows,) source row of every GGUF row: gguf[i] = hf[row_order[i]]."""
    if rows % (2 * heads):
        raise InputError(f"{rows} rows do not divide into {heads} heads of even size")
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def hf_order(rows: int, heads: int) -> NDArray[np.intp]:
    """The inverse: hf[i] = gguf[hf_order[i]]."""
    return np.argsort(row_order(rows, heads))
