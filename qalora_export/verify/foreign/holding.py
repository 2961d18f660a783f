"""What a storage type can hold of given numbers: the squared error that its coarsest right use leaves in a block.

Every quantized type is a grid with few levels whose step is shared by some neighbours, and many have steps that are
themselves stored on a grid shared by a super-block. From the source's numbers alone follows

    step   = extent / levels                 extent: largest |w| of the neighbours, or their range with 0 in it
    error² = n · step²/12 + Σ w² · min(1, (coarsest step / step levels / step)²)

the error of rounding to the nearest level, and of a step that is itself rounded. What tools make differs from this by a
small factor, whatever they weigh by (importance matrices, GPTQ, AutoRound); numbers of another tensor, another order or
another step differ by far more. The factors are measured over every type: tests/verify/foreign/test_holding.py.

Sources: block layouts in ggml-common.h and their reference quantizers in ggml-quants.c; MatMulNBits of ONNX Runtime.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import InputError

TINY = np.finfo(np.float64).tiny


@dataclass(frozen=True, slots=True)
class Holding:
    """A grid. block: neighbours along in-features that share one step. levels: steps in the extent.

    offset: the extent is the range of the values, 0 included, else the largest magnitude. above: neighbours whose steps
    share a grid of their own; step_levels: how many steps it has, 0 where each step is a float of its own. step: the
    one of all blocks, where a whole tensor shares one; 0 where blocks have their own.
    """

    block: int
    levels: float
    offset: bool = False
    above: int = 0
    step_levels: int = 0
    step: float = 0.0


# Levels of codebooks that are no even grid: what the largest gap between neighbours is of the largest magnitude.
HELD: dict[str, Holding] = {
    "Q4_0": Holding(32, 8),
    "Q4_1": Holding(32, 15, offset=True),
    "Q5_0": Holding(32, 16),
    "Q5_1": Holding(32, 31, offset=True),
    "Q8_0": Holding(32, 127),
    "Q2_K": Holding(16, 3, offset=True, above=256, step_levels=15),
    "Q3_K": Holding(16, 4, above=256, step_levels=31),
    "Q4_K": Holding(32, 15, offset=True, above=256, step_levels=63),
    "Q5_K": Holding(32, 31, offset=True, above=256, step_levels=63),
    "Q6_K": Holding(16, 32, above=256, step_levels=127),
    "IQ4_NL": Holding(32, 5.3),
    "IQ4_XS": Holding(32, 5.3, above=256, step_levels=31),
    "IQ3_S": Holding(32, 4, above=256, step_levels=15),
    "IQ3_XXS": Holding(32, 3.5, above=256, step_levels=15),
    "IQ2_S": Holding(16, 2, above=256, step_levels=15),
    "IQ2_XS": Holding(16, 2, above=256, step_levels=15),
    "IQ2_XXS": Holding(32, 2, above=256, step_levels=15),
    "IQ1_M": Holding(16, 1, above=256, step_levels=7),
    "IQ1_S": Holding(32, 1, above=256, step_levels=7),
    "TQ1_0": Holding(256, 1),
    "TQ2_0": Holding(256, 1),
    "MXFP4": Holding(32, 1.5),
    "NVFP4": Holding(16, 3),
}
FLOATS = {"F16": 2.0**-11, "BF16": 2.0**-8, "F32": 2.0**-22, "F64": 2.0**-22}  # converters exist that cut BF16 off
LARGEST_BLOCK = 32  # values of a float type that are looked at together
# How far a right file's block may stand out from what its type holds, and from 99.5 % of its tensor's own blocks:
# measured 4.8 (Q6_K), 6.8 (NVFP4) and, in the types that weigh a whole block of 32 by an importance matrix, 28.
OUTSTANDS, WEIGHED = 8.0, {"Q4_0": 40.0, "Q4_1": 40.0, "Q5_0": 40.0, "Q5_1": 40.0}
STEP = re.compile(r" step \S+")
INTEGER = re.compile(r"int(\d) g(\d+)(?: step (\S+))?( offset)?")


def without_step(kind: str) -> str:
    """A type as it is told: a step that a whole tensor shares is that tensor's own."""
    return STEP.sub("", kind)


def holding_of(kind: str) -> Holding | None:
    """The grid of a type, None for a float type. Raises InputError for a type that is not known."""
    if kind in FLOATS:
        return None
    if kind in HELD:
        return HELD[kind]
    if found := INTEGER.fullmatch(kind):
        bits, group = int(found[1]), int(found[2])
        levels = 2**bits - 1 if found[4] else 2 ** (bits - 1)
        return Holding(group, levels, offset=bool(found[4]), step=float(found[3] or 0))
    raise InputError(f"what a tensor of type {kind} can hold is not known", fix="update qalora-export")


def block_limit(kind: str) -> float:
    """Of a block's squared error, in what its type holds; twice the root of it in float types."""
    return 4.0 if kind in FLOATS else WEIGHED.get(kind, OUTSTANDS)


def held_error(values: NDArray[np.floating], held: Holding) -> NDArray[np.float64]:
    """Squared error by block, float64 (rows, blocks): blocks are held.above or held.block values long.

    values: (rows, in), in a multiple of that.
    """
    w = np.asarray(values, np.float64)
    whole = held.above or held.block
    parts = w.reshape(len(w), -1, whole // held.block, held.block)
    extent = np.maximum(parts.max(-1), 0) - np.minimum(parts.min(-1), 0) if held.offset else np.abs(parts).max(-1)
    step = np.full_like(extent, held.step) if held.step else extent / held.levels
    error = held.block * step**2 / 12
    if held.step_levels:
        off = step.max(-1, keepdims=True) / held.step_levels / 2
        error += (parts**2).sum(-1) * np.minimum(1.0, off / np.maximum(step, TINY)) ** 2
    total: NDArray[np.float64] = error.sum(-1)
    return total
