"""The zero points of a GPTQ checkpoint, undone the way they were written.

qzeros is a string of b-bit values along out-features, 32 bits to a word, low bit first. v2 holds z; v1 holds z − 1, and
writers differ in how they took that 1 away. It shows only beside a zero point of 0:

    GPTQModel, AutoRound        2, 4, 8 bits: from whole 32-bit words, so a 0 borrows from the value above it
    GPTQModel from 6.1          3 bits: from each value, modulo 8
    GPTQModel before 6.1        3 bits: from whole words, with the constants of the first and third word exchanged
    AutoGPTQ, GPTQ-for-LLaMa    from each value, packed by OR, so −1 (all ones) covers every value above it in its word

The first three are undone exactly by the opposite step. What AutoGPTQ covered is lost, in its own reader too. Sources:
gptqmodel/utils/model.py, `convert_gptq_v2_to_v1_format_module`; auto_gptq/nn_modules/qlinear, `pack`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qalora_export.grid import unpack_codes

Rule = Literal["stored", "per value", "per word"]

# What is taken away from each word, by its place among the words that share no value with others. At 3 bits the places
# of the ones do not fit the values (bits 0, 3, … of the first word would): so did GPTQModel before 6.1.
TAKEN = {2: (0x55555555,), 3: (0x24924924, 0x92492492, 0x49249249), 4: (0x11111111,), 8: (0x01010101,)}


def zero_points(qzeros: NDArray[Any], bits: int, rule: Rule) -> NDArray[np.uint8]:
    """int32 (G, out·b/32) as stored -> zero points uint8 (G, out), each in [0, 2^bits)."""
    words = _words(qzeros)
    if rule == "per word":
        return values(words + np.resize(np.array(TAKEN[bits], np.uint32), words.shape[-1]), bits)  # modulo 2^32
    one = np.uint8(rule == "per value")
    return (values(words, bits) + one) & np.uint8(2**bits - 1)


def values(words: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """int32 or uint32 (G, out·b/32) -> the values as stored, uint8 (G, out)."""
    return unpack_codes(np.ascontiguousarray(words).astype(words.dtype.newbyteorder("<")).view(np.uint8), bits)


@dataclass(frozen=True, slots=True)
class Wraps:
    """Stored values that are all ones (z − 1 of a zero point of 0), by what lies above them in their word.

    topmost: nothing, so every rule but "stored" gives 0.  open: bits that are not all ones, so no OR of −1 covered
    them.  covered: ones only: AutoGPTQ's −1, or by chance what others make of a run of zero points 0, 1, 1, …
    hidden: how many values lie above the covered ones.
    """

    topmost: int = 0
    open: int = 0
    covered: int = 0
    hidden: int = 0

    def __add__(self, other: Wraps) -> Wraps:
        return Wraps(
            self.topmost + other.topmost,
            self.open + other.open,
            self.covered + other.covered,
            self.hidden + other.hidden,
        )


def find_wraps(qzeros: NDArray[Any], bits: int) -> Wraps:
    """Look at the lowest all-ones value of each word of qzeros int32 (G, out·b/32)."""
    words = _words(qzeros).astype(np.uint64)
    stored = values(_words(qzeros), bits)
    result = Wraps()
    per_row = stored.shape[-1]
    begin = np.arange(per_row) * bits
    word, position = begin // 32, begin % 32
    seen = np.zeros(words.shape, bool)
    for index in np.flatnonzero((stored == 2**bits - 1).any(axis=0)):
        at, shift = word[index], int(position[index])
        rows = (stored[:, index] == 2**bits - 1) & ~seen[:, at]
        seen[rows, at] = True
        count = int(np.count_nonzero(rows))
        above = 32 - shift - bits
        if above <= 0:
            result += Wraps(topmost=count)
            continue
        ones = (words[rows, at] >> np.uint64(shift + bits)) == np.uint64(2**above - 1)
        covered = int(np.count_nonzero(ones))
        hidden = int(np.count_nonzero((word == at) & (position > shift)))
        result += Wraps(open=count - covered, covered=covered, hidden=covered * hidden)
    return result


def _words(qzeros: NDArray[Any]) -> NDArray[np.uint32]:
    return np.ascontiguousarray(qzeros).view(np.uint32)
