"""The weights of a base against those of the model that it was quantized from.

What quantizing leaves alone (norms, biases, most embeddings) is the source's bit for bit, and so is a matrix that the
source held in canonical form already. A matrix that was quantized cannot equal its source; how far it may be from it
follows from the source's own numbers: rounding to the nearest of a group's 2^bits levels leaves step²/12 per weight,
and GPTQ trades some of that for what its calibration text needs. Rows that hold anything else are further off.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.model_folder import ModelFolder, as_float32
from qalora_export.grid import difference, differing
from qalora_export.quantization.gguf_source import GgufModel

ROWS = 512  # looked at together
# Squared error of a row over that of rounding to nearest (MOST_RATIO alone, RATIO together with MOST_SHARE), and over
# the row itself. Measured on the sample base over 2 to 8 bits and all group sizes: rounding reaches a ratio of 3.0 and
# a share of 0.76, GPTQ with sweeps 4.3 (4 bits, symmetric, g 128) and 1.39 (2 bits, symmetric, g 128, at a ratio of
# 2.3). Rows of another matrix have a share of 2, at 2 bits ratios of 4 to 20, at 3 bits and more beyond 30.
MOST_RATIO, RATIO, MOST_SHARE = 32.0, 3.5, 1.5
TINY = np.finfo(np.float64).tiny


def changed_weights(source: ModelFolder, base: CanonicalCheckpoint) -> list[str]:
    """One line for each tensor of `base` that quantizing does not make of the one in `source`."""
    return [*_plain(source, base), *_quantized(source, base)]


def packed_elsewhere(source: ModelFolder, base: CanonicalCheckpoint) -> int:
    """How many quantized matrices cannot be compared: the source holds them packed in another format."""
    return sum(f"{module}.weight" not in source and module not in _stored(source) for module in base.modules)


def _stored(source: ModelFolder) -> dict[str, tuple[int, int]]:
    return source.stored_modules() if isinstance(source, GgufModel) else {}


def _plain(source: ModelFolder, base: CanonicalCheckpoint) -> Iterator[str]:
    kept, anew = base.plain_names(), {f"{name}.weight" for name in _embeddings(source, base)}
    for name in (name for name in kept if name not in anew):
        if name not in source:
            yield f"{name}: no such tensor in the model it was made from"
        elif count := differing(np.asarray(source.tensor(name)), np.asarray(base.tensor(name))):
            yield f"{name}: {count} values other than in the model it was made from"
    quantized = {f"{module}.weight" for module in base.modules}
    known = {*kept, *quantized, *(f"{module}.bias" for module in base.modules)}
    for name in source.names():
        if name not in known and name.endswith((".weight", ".bias")):
            yield f"{name}: not taken along"


def _embeddings(source: ModelFolder, base: CanonicalCheckpoint) -> list[str]:
    """Embeddings that went into blocks; those that the source held in such blocks are the source's."""
    held = source.embedding_grid if isinstance(source, GgufModel) else lambda _: None
    return [name for name in base.embeddings if held(name) is None]


def _quantized(source: ModelFolder, base: CanonicalCheckpoint) -> Iterator[str]:
    stored = _stored(source)
    for module in (*base.modules, *_embeddings(source, base)):
        if module in stored and isinstance(source, GgufModel):
            if count := difference(source.stored(module), base.group_affine(module)).total:
                yield f"{module}: {count} codes, scales and offsets other than in the file it was made from"
        elif f"{module}.weight" in source:
            values = np.asarray(source.tensor(f"{module}.weight"))
            ratios, shares = row_errors(base, module, values)
            right = (ratios <= MOST_RATIO) & ((ratios <= RATIO) | (shares <= MOST_SHARE))
            wrong = np.flatnonzero(~right)
            if wrong.size:
                yield (
                    f"{module}: {wrong.size} rows are not those of the model it was made from, the first is {wrong[0]} "
                    f"({ratios[wrong[0]]:.3g} times what rounding leaves)"
                )


def row_errors(
    base: CanonicalCheckpoint, module: str, source: NDArray[np.generic]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Squared error of each row, float64 (out,): over that of rounding to nearest, and over the row's own square.

    source: (out, in). Rows of another shape are infinitely far.
    """
    bits, group = base.modules[module] if module in base.modules else base.embeddings[module][:2]
    out = base.entry(f"{module}.scale").shape[0]
    if source.shape != (out, base.entry(f"{module}.scale").shape[1] * group):
        return np.full(out, np.inf), np.full(out, np.inf)
    ratios, shares = list[NDArray[np.float64]](), list[NDArray[np.float64]]()
    for begin in range(0, out, ROWS):
        rows = slice(begin, min(begin + ROWS, out))
        wanted = as_float32(source[rows]).astype(np.float64)
        found = base.packed(module, rows).unpack().dequantize().astype(np.float64)
        error = ((found - wanted) ** 2).sum(-1)
        parts = wanted.reshape(len(wanted), -1, group)
        extent = np.maximum(parts.max(-1), 0) - np.minimum(parts.min(-1), 0)
        left = group * ((extent / (2**bits - 1)) ** 2).sum(-1) / 12
        with np.errstate(over="ignore"):  # a row that should be zero and is not is infinitely far
            ratios.append(np.where(error > 0, error / np.maximum(left, TINY), 0.0))
            shares.append(np.where(error > 0, error / np.maximum((wanted**2).sum(-1), TINY), 0.0))
    return np.concatenate(ratios), np.concatenate(shares)
