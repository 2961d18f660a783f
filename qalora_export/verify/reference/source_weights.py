"""The weights of a base against those of the model that it was quantized from.

What quantizing leaves alone (norms, biases, most embeddings) is the source's bit for bit, and so is a matrix that the
source held as codes already (GGUF, GPTQ). A matrix that was quantized cannot equal its source; how far it may be from
it follows from the source's own numbers: rounding to the nearest of a group's 2^bits levels leaves step²/12 per weight,
and GPTQ trades some of that for what its calibration text needs; the direction of a row, and of nearly every group,
stays. Rows that hold anything else are further off or point elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.manifest import has_manifest, read_manifest
from qalora_export.checkpoint.model_folder import ModelFolder, as_float32
from qalora_export.errors import InputError
from qalora_export.grid import GroupAffine, difference, differing
from qalora_export.quantization.gguf_source import GgufModel
from qalora_export.quantization.gptq_import import packed_in
from qalora_export.quantization.gptq_version import VERSIONS
from qalora_export.quantization.source import gptq_config

ROWS = 512  # looked at together
# Squared error of a row over that of rounding to nearest, at most, by bits (5: and more). Measured on the sample base
# and on a Llama with one channel × 64, over 2 to 8 bits, g 32 and 128, with and without offsets: rounding reaches 3.0,
# GPTQ 10.6 at 2 bits and 36.7 at 8, where little is left to be far from. Rows of another matrix: 4 to 20 at 2 bits,
# hundreds at 4, 10^5 at 8.
MOST_RATIO = {2: 32.0, 3: 32.0, 4: 64.0, 5: 256.0}
# Cosine of a row, and of a group, with its source, by bits (5: and more). The least of right rows in the same bases:
# 0.269 (symmetric, on 512 tokens), 0.815, 0.97; of right groups 0.073, 0.69, 0.96, but one of 50,000 groups at 2 bits
# is next to nothing. Zeros and numbers of another place have a cosine near 0, the other sign one below. Groups below
# half of their row's mean square do not count: GPTQ gives them the errors of the others to bear.
LEAST_ROW = {2: 0.15, 3: 0.6, 4: 0.8, 5: 0.9}
LEAST_GROUP = {2: 0.15, 3: 0.4, 4: 0.7, 5: 0.8}
FEW, SHARE_OF_GROUPS = 3, 1e-3  # groups of a matrix that may lie below
TINY = np.finfo(np.float64).tiny


def changed_weights(source: ModelFolder, base: CanonicalCheckpoint) -> list[str]:
    """One line for each tensor of `base` that quantizing does not make of the one in `source`."""
    return [*_plain(source, base), *_quantized(source, base)]


def packed_elsewhere(source: ModelFolder, base: CanonicalCheckpoint) -> int:
    """How many quantized matrices cannot be compared: the source holds them packed in a format that is not read."""
    stored = _stored(source, base)
    return sum(f"{module}.weight" not in source and module not in stored for module in base.modules)


def _stored(source: ModelFolder, base: CanonicalCheckpoint) -> Mapping[str, Callable[[str], GroupAffine]]:
    """Modules whose codes the source has already -> how they are read from it."""
    if isinstance(source, GgufModel):
        return dict.fromkeys(source.stored_modules(), source.stored)
    packed = [module for module in base.modules if f"{module}.qweight" in source]
    try:
        gptq = gptq_config(source) if packed else None
        if gptq is None:
            return {}
        shapes = {module: _shape(base, module) for module in packed}
        found = packed_in(source, gptq, shapes, _version(base))
    except InputError:
        return {}
    return dict.fromkeys(packed, lambda module: found.matrix(module)[0])


def _version(base: CanonicalCheckpoint) -> str | None:
    """How the import took the source's zero points, as its manifest says."""
    settings = read_manifest(base.path).get("settings") if has_manifest(base.path) else None
    version = settings.get("checkpoint_format") if isinstance(settings, dict) else None
    return version if version in VERSIONS else None


def _shape(base: CanonicalCheckpoint, module: str) -> tuple[int, int]:
    out, groups = base.entry(f"{module}.scale").shape
    return out, groups * base.modules[module][1]


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
    held = source.embedding_plan if isinstance(source, GgufModel) else lambda _: None
    return [name for name in base.embeddings if held(name) is None]


def _quantized(source: ModelFolder, base: CanonicalCheckpoint) -> Iterator[str]:
    stored = _stored(source, base)
    for module in (*base.modules, *_embeddings(source, base)):
        if module in stored:
            if count := difference(stored[module](module), base.group_affine(module)).total:
                yield f"{module}: {count} codes, scales and offsets other than in what it was made from"
        elif f"{module}.weight" in source:
            values = np.asarray(source.tensor(f"{module}.weight"))
            if said := closeness(base, module, values).describe():
                yield f"{module}: {said}"


@dataclass(frozen=True, slots=True)
class Closeness:
    """A quantized matrix beside its source.

    ratio: squared error of each row over that of rounding to nearest, float64 (out,). cosine: of each row with its
    source, float64 (out,); 1 where the source is zero. strange: groups of each row below LEAST_GROUP, int64 (out,).
    groups: of the whole matrix.
    """

    bits: int
    ratio: NDArray[np.float64]
    cosine: NDArray[np.float64]
    strange: NDArray[np.int64]
    groups: int

    @property
    def wrong(self) -> NDArray[np.intp]:
        """Rows that quantizing does not make of the source's."""
        bits = min(self.bits, 5)
        return np.flatnonzero((self.ratio > MOST_RATIO[bits]) | (self.cosine < LEAST_ROW[bits]))

    def describe(self) -> str:
        """What is wrong with it; "" for nothing."""
        if self.wrong.size:
            first = self.wrong[0]
            return (
                f"{self.wrong.size} rows are not those of the model it was made from, the first is {first} "
                f"({self.ratio[first]:.3g} times what rounding leaves, cosine {self.cosine[first]:.3f})"
            )
        count = int(self.strange.sum())
        if count > FEW + SHARE_OF_GROUPS * self.groups:
            return (
                f"{count} of {self.groups} groups are not those of the model it was made from, most of them in row "
                f"{int(self.strange.argmax())}"
            )
        return ""


def closeness(base: CanonicalCheckpoint, module: str, source: NDArray[np.generic]) -> Closeness:
    """How near `module` of `base` is to source, (out, in); rows of another shape are infinitely far."""
    bits, group = base.modules[module] if module in base.modules else base.embeddings[module][:2]
    out, groups = base.entry(f"{module}.scale").shape
    if source.shape != (out, groups * group):
        return Closeness(bits, np.full(out, np.inf), np.zeros(out), np.zeros(out, np.int64), out * groups)
    found = list[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]]()
    for begin in range(0, out, ROWS):
        rows = slice(begin, min(begin + ROWS, out))
        wanted = as_float32(source[rows]).astype(np.float64).reshape(-1, groups, group)
        values = base.packed(module, rows).unpack().dequantize().astype(np.float64).reshape(wanted.shape)
        extent = np.maximum(wanted.max(-1), 0) - np.minimum(wanted.min(-1), 0)
        left = group * ((extent / (2**bits - 1)) ** 2).sum(-1) / 12
        error = ((values - wanted) ** 2).sum((1, 2))
        with np.errstate(over="ignore"):  # a row that should be zero and is not is infinitely far
            ratio = np.where(error > 0, error / np.maximum(left, TINY), 0.0)
        squares, own, product = (wanted**2).sum(-1), (values**2).sum(-1), (wanted * values).sum(-1)
        cosine = _cosine(product.sum(-1), squares.sum(-1), own.sum(-1))
        heavy = squares >= squares.mean(-1, keepdims=True) / 2
        strange = heavy & (_cosine(product, squares, own) < LEAST_GROUP[min(bits, 5)])
        found.append((ratio, cosine, strange.sum(-1)))
    ratios, cosines, counts = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Closeness(bits, ratios, cosines, counts, out * groups)


def _cosine(
    product: NDArray[np.float64], wanted: NDArray[np.float64], found: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Of sums of products and of squares; 1 where nothing is wanted, 0 where nothing was found."""
    return np.where(wanted > 0, product / np.maximum(np.sqrt(wanted * found), TINY), 1.0)
