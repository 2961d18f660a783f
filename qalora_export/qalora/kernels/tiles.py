"""What the kernels share: reading eight codes at a time, and rounding to the compute dtype.

A run is eight neighbouring codes: `bits` whole bytes at every width. One thread reads one run as one word, the scale
and offset of its group, and writes eight numbers (16 bytes of bf16): all accesses are wide and coalesced.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
RUN = 8
# A run as one integer; three, five and six bytes are no integer, so those runs are read byte by byte.
WORDS = {2: torch.int16, 3: torch.uint8, 4: torch.int32, 5: torch.uint8, 6: torch.uint8, 8: torch.int64}


def as_words(packed: Tensor, bits: int) -> Tensor:
    """Packed codes uint8 (out, in·bits/8) as a flat tensor of words, one (3, 5, 6 bits: so many) per run of codes."""
    flat, word = packed.reshape(-1), WORDS[bits]
    if flat.storage_offset() % word.itemsize or flat.data_ptr() % word.itemsize:
        flat = flat.clone()  # a view that begins between words
    return flat.view(word)


@triton.jit
def load_codes(words, run, keep, BITS: tl.constexpr):
    """The codes of runs: run and keep [R, C] → int32 [R, C, 8]; runs that are not kept give 0."""
    if BITS == 3:
        low = tl.load(words + run * 3, mask=keep, other=0).to(tl.int32)
        middle = tl.load(words + run * 3 + 1, mask=keep, other=0).to(tl.int32)
        high = tl.load(words + run * 3 + 2, mask=keep, other=0).to(tl.int32)
        word = low | (middle << 8) | (high << 16)
    elif BITS == 5 or BITS == 6:
        word = tl.load(words + run * BITS, mask=keep, other=0).to(tl.int64)
        for byte in tl.static_range(1, BITS):
            word |= tl.load(words + run * BITS + byte, mask=keep, other=0).to(tl.int64) << (8 * byte)
    elif BITS == 8:
        word = tl.load(words + run, mask=keep, other=0)
    else:
        word = tl.load(words + run, mask=keep, other=0).to(tl.int32)
    shifts = (tl.arange(0, 8) * BITS).to(word.dtype)
    return ((word[:, :, None] >> shifts[None, None, :]) & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def round_to(value, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 → `dtype`, to nearest, ties to even. GPUs have an instruction; Triton's interpreter truncates to bf16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)
