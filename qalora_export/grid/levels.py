"""Scales and offsets of a grid of super-blocks: small integers and their steps, to and from the numbers they stand for.

    scale  = scale_step · scale_level           float32 (out, in/g), exact
    offset = −offset_step · offset_level        float32 (out, in/g), exact

`project` finds levels and steps for real numbers: the largest of a super-block gets the top level, the others the
nearest. `factor` finds them for numbers that lie on the grid already, exactly, so levels need not be carried along.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import InputError
from qalora_export.grid.named import SuperBlockGrid, SymmetricGrid


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """scale, offset: uint8 (out, in/g), at most grid.top. scale_step, offset_step: float16 (out, in/256).

    Raises InputError when shapes or dtypes disagree, a level is beyond the top or a step is not finite.
    """

    grid: SuperBlockGrid
    scale: NDArray[np.uint8]
    offset: NDArray[np.uint8]
    scale_step: NDArray[np.float16]
    offset_step: NDArray[np.float16]

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise InputError(f"not a grid of super-blocks: {problem}", why='see DESIGN.md, "Grids"')

    def scales(self) -> NDArray[np.float32]:
        """float32 (out, in/g)."""
        return _products(self.scale, self.scale_step, self.grid)

    def offsets(self) -> NDArray[np.float32]:
        """float32 (out, in/g); −0 where the level is 0, as d·k·q − 0 has it."""
        return -_products(self.offset, self.offset_step, self.grid)


@dataclass(frozen=True, slots=True, eq=False)
class SymmetricLevels:
    """scale: int8 (out, in/g). scale_step: float16 (out, in/256). The offset is −2^(bits−1)·scale.

    Raises InputError when shapes or dtypes disagree or a step is not finite.
    """

    grid: SymmetricGrid
    scale: NDArray[np.int8]
    scale_step: NDArray[np.float16]

    def __post_init__(self) -> None:
        shape, per_row = self.scale.shape, self.scale_step.shape
        problem = ""
        if self.scale.dtype != np.int8 or self.scale_step.dtype != np.float16:
            problem = "levels are int8 and steps float16"
        elif len(shape) != 2 or shape != (per_row[0], per_row[-1] * self.grid.groups):
            problem = f"{shape} levels do not divide into {per_row} super-blocks of {self.grid.groups}"
        elif not np.isfinite(self.scale_step).all():
            problem = "a step is NaN or infinite"
        if problem:
            raise InputError(f"not a grid of super-blocks: {problem}", why='see DESIGN.md, "Grids"')

    def scales(self) -> NDArray[np.float32]:
        """float32 (out, in/g)."""
        return _products(self.scale, self.scale_step, self.grid)

    def offsets(self) -> NDArray[np.float32]:
        """float32 (out, in/g), exact."""
        return np.float32(-(2 ** (self.grid.bits - 1))) * self.scales()


AnyLevels = Levels | SymmetricLevels


def project(values: NDArray[np.float64], grid: SuperBlockGrid) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """(levels (out, in/g), steps (out, in/256)) next to real numbers ≥ 0, float64 (out, in/g); negative ones become 0.

    step = float16(largest / top), which is infinite where float16 ends; level = value / step, ties to even.
    """
    blocks = values.reshape(len(values), -1, grid.groups)
    with np.errstate(over="ignore"):  # through float32, as torch does it on every device
        step = (blocks.max(axis=-1).clip(0) / grid.top).astype(np.float32).astype(np.float16)
    wide = step.astype(np.float64)[..., None]
    levels = np.rint(np.divide(blocks, wide, out=np.zeros_like(blocks), where=wide > 0)).clip(0, grid.top)
    return levels.astype(np.uint8).reshape(values.shape), step


def factor(
    values: NDArray[np.float64], grid: SuperBlockGrid, *, where: str
) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """(levels, steps) whose products are these very numbers, float64 (out, in/g). Raises InputError where none are.

    Of several, those with the highest levels: 2·3 is also 1·6.
    """
    blocks = values.reshape(len(values), -1, grid.groups)
    largest = blocks.max(axis=-1)
    levels, steps = np.zeros(blocks.shape), np.zeros(largest.shape)
    missing = blocks.any(axis=-1)
    for top in range(grid.top, 0, -1):
        with np.errstate(over="ignore", invalid="ignore"):  # a step that float16 does not hold gives none of them
            step = (largest / top).astype(np.float16).astype(np.float64)
            found = np.rint(np.divide(blocks, step[..., None], out=np.zeros_like(blocks), where=step[..., None] > 0))
            same = (found * step[..., None] == blocks).all(axis=-1)
        fits = missing & same & ((found >= 0) & (found <= grid.top)).all(-1)
        levels[fits], steps[fits] = found[fits], step[fits]
        missing &= ~fits
    if missing.any():
        raise InputError(f"{int(missing.sum())} super-blocks do not lie on grid {grid.name}", where=where)
    return levels.astype(np.uint8).reshape(values.shape), steps.astype(np.float16)


def _products(levels: NDArray[Any], steps: NDArray[np.float16], grid: SuperBlockGrid) -> NDArray[np.float32]:
    wide = levels.reshape(*steps.shape, grid.groups).astype(np.float32) * steps.astype(np.float32)[..., None]
    products: NDArray[np.float32] = wide.reshape(levels.shape)
    return products


def _problem(levels: Levels) -> str:
    grid, steps = levels.grid, (levels.scale_step, levels.offset_step)
    parts = (levels.scale, levels.offset)
    if {p.dtype for p in parts} != {np.dtype(np.uint8)} or {s.dtype for s in steps} != {np.dtype(np.float16)}:
        return "levels are uint8 and steps float16"
    shape, per_row = levels.scale.shape, levels.scale_step.shape
    if len(shape) != 2 or levels.offset.shape != shape or levels.offset_step.shape != per_row:
        return f"levels {shape}, {levels.offset.shape} and steps {per_row}, {levels.offset_step.shape} differ"
    if shape != (per_row[0], per_row[-1] * grid.groups):
        return f"{shape} levels do not divide into {per_row} super-blocks of {grid.groups}"
    if max(int(part.max(initial=0)) for part in parts) > grid.top:
        return f"a level is above {grid.top}"
    if not all(np.isfinite(step).all() for step in steps):
        return "a step is NaN or infinite"
    return ""
