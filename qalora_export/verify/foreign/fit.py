"""How near a tensor of the artifact is to a tensor of the source, in what its type can hold (holding.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.model_folder import ModelFolder, as_float32
from qalora_export.verify.foreign.artifact import Tensor
from qalora_export.verify.foreign.holding import FLOATS, LARGEST_BLOCK, Holding, block_limit, held_error, holding_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Measured over all types, nine kinds of numbers and importance matrices up to e^(3·normal): right files reach 5.4 and
# 0.6; another tensor's numbers begin at 16 where four levels are held, and at a cosine near 0 everywhere.
TENSOR_RATIO, LEAST_COSINE = 8.0, 0.5
SMALLEST = 2.0**-25  # half the step of float16 near 0
OUTSTANDING = 0.995  # quantile of a tensor's own blocks that one is measured by
NOTHING_LIKE = 1.5  # squared error over squared source of a block: right ones reach 1.1, unrelated numbers are at 2
TINY = np.finfo(np.float64).tiny


@dataclass(frozen=True, slots=True)
class Fit:
    """How near a tensor is to a source. ratio: squared error over what its type can hold. error: root of squared error
    over squared source. cosine; scale: the source is best met by scale times the tensor. worst: of the blocks, how far
    above the limit (1 is at it); at: (row, first column) of that block; blocks: how many are above; rest: the ratio
    without these.
    """

    ratio: float
    error: float
    cosine: float
    scale: float
    worst: float
    at: tuple[int, int]
    blocks: int
    total_blocks: int
    rest: float

    @property
    def few_blocks(self) -> bool:
        """Whether those above the limit are a part of the tensor and not its nature."""
        return self.blocks <= max(1, self.total_blocks // 10)

    @property
    def in_few_blocks(self) -> bool:
        """Whether some blocks are wrong, however far they pull the whole, and what is left is the source."""
        return self.blocks > 0 and self.few_blocks and self.rest <= TENSOR_RATIO

    @property
    def right(self) -> bool:
        return self.like and self.worst <= 1 and not self.scaled

    @property
    def like(self) -> bool:
        """Whether the tensor as a whole is the source in this type."""
        return self.ratio <= TENSOR_RATIO and self.cosine >= LEAST_COSINE

    @property
    def scaled(self) -> bool:
        """Whether a factor is on all of it that rounding does not explain: right ones reach 0.9 times this."""
        rounding = np.sqrt(max(0.0, 1 - self.cosine**2))  # what is left of the error with the best factor
        return bool(abs(self.scale - 1) > 2e-3 + 0.4 * rounding + 3 * rounding**2)


def fit(tensor: Tensor, source: NDArray[Any], load: Any = None) -> Fit:
    """tensor against a source of the same shape; load: in place of the tensor's own loader."""
    load, kind = load or tensor.load, tensor.kind
    held = holding_of(kind)
    total = np.zeros(4)  # error², source², product, tensor²
    allowed, parts = 0.0, list[tuple[NDArray[np.float64], ...]]()
    for rows in tensor.slices():
        wanted = _rows(source, rows, tensor.shift)
        found = load(rows).astype(np.float64).reshape(wanted.shape)
        with np.errstate(over="ignore", invalid="ignore"):
            error, bound, power = _by_block(wanted, found, held, kind)
            total += [error.sum(), (wanted**2).sum(), (wanted * found).sum(), (found**2).sum()]
        allowed += float(bound.sum())
        parts.append((error, bound, power))
    error, bound, power = (np.concatenate(column) for column in zip(*parts, strict=True))
    above = _above(error, bound, power, held, kind)
    place = np.unravel_index(int(np.argmax(above)), above.shape)
    width = -(-source.shape[-1] // above.shape[1]) if source.ndim > 1 else 1
    finite = bool(np.isfinite(total).all())
    return Fit(
        ratio=_ratio(total[0], allowed) if finite else np.inf,
        error=float(np.sqrt(total[0] / max(total[1], TINY))) if finite else np.inf,
        cosine=_cosine(total) if finite else 0.0,
        scale=float(total[2] / total[3]) if finite and total[3] > 0 else 1.0,
        worst=float(above[place]),
        at=(int(place[0]), int(place[1]) * width),
        blocks=int(np.count_nonzero(above > 1)),
        total_blocks=above.size,
        rest=_ratio(error[above <= 1].sum(), bound[above <= 1].sum()),
    )


def _ratio(error: float, allowed: float) -> float:
    return float(error / max(allowed, TINY)) if error else 0.0


def _above(
    error: NDArray[np.float64],
    bound: NDArray[np.float64],
    power: NDArray[np.float64],
    held: Holding | None,
    kind: str,
) -> NDArray[np.float64]:
    """How far each block is above what a right one shows, 1 being at it: beside the tensor's own blocks, and beside
    the numbers it should hold."""
    ratios = np.where(error > 0, error / np.maximum(bound, TINY), 0.0)
    ratios[~np.isfinite(error)] = np.inf
    usual = 1.0 if held is None else max(1.0, float(np.quantile(ratios, OUTSTANDING)))
    unlike = np.where(ratios > block_limit(kind), error / np.maximum(power, TINY) / NOTHING_LIKE, 0.0)
    unlike[~np.isfinite(error)] = np.inf
    return np.maximum(ratios / (block_limit(kind) * usual), unlike)


def _cosine(total: NDArray[np.float64]) -> float:
    if total[0] == 0:
        return 1.0
    return float(total[2] / max(np.sqrt(total[1] * total[3]), TINY))


def _rows(source: NDArray[Any], rows: slice, shift: float) -> NDArray[np.float64]:
    values = as_float32(source[rows])
    if shift:
        values = values + np.float32(shift)
    return values.astype(np.float64).reshape(len(values), -1)


def _by_block(
    wanted: NDArray[np.float64], found: NDArray[np.float64], held: Holding | None, kind: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """(squared error, what is allowed, squared source) by block, (rows, blocks) each. Float types have none: there a
    block is up to LARGEST_BLOCK values. The last block of a row may be short of values (MatMulNBits).
    """
    squared = (wanted - found) ** 2
    squared[wanted == found] = 0.0  # infinities of both, too
    if held is not None:
        size = held.above or held.block
        wanted, squared = _filled(wanted, size), _filled(squared, size)
        bound = held_error(wanted, held)
    else:
        relative = FLOATS[kind]
        each = (relative * np.abs(wanted)) ** 2 + (SMALLEST**2 if relative else 0.0)
        size = next(n for n in range(min(LARGEST_BLOCK, wanted.shape[1]), 0, -1) if wanted.shape[1] % n == 0)
        bound = each.reshape(len(wanted), -1, size).sum(-1)
    parts = (len(wanted), -1, size)
    return squared.reshape(parts).sum(-1), bound, (wanted**2).reshape(parts).sum(-1)


def _filled(values: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """(rows, columns) with zeros behind each row up to a multiple of `size`, as tools fill a last block."""
    missing = -values.shape[1] % size
    return np.pad(values, ((0, 0), (0, missing))) if missing else values


def source_of(folder: ModelFolder, name: str) -> NDArray[Any] | None:
    """The source's tensor, the embedding for a head that is tied to it, or None."""
    if name not in folder and name == HEAD:
        name = EMBEDDING
    return folder.tensor(name) if name in folder else None
