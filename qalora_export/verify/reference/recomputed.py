"""The numbers of a merged matrix, recomputed from base and adapter in numpy float64, apart from training and merging.

    offset_eff = fp16( m + scaling · B A )
    scale_eff  = fp16( s + scaling · B_s A_s / σ )  where scales were trained, and offset_eff less c · (scale_eff − s)

c and σ are mean and standard deviation of the codes of a group. On a grid of super-blocks either goes to its levels:
step = fp16(step · largest now / largest of the base), levels next to it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qalora_export.grid import Levels, SuperBlockGrid, SymmetricLevels, unpack_codes
from qalora_export.grid.packed_affine import PackedAffine
from qalora_export.qalora.adapter_files import ModuleAdapter

# float64 sums of the product may be ordered otherwise, and torch rounds to float16 through float32: the exact value
# may lie this far, relative to the terms that were added, on the other side of a rounding boundary.
FLOAT32_STEP = 2.0**-23
Wide = NDArray[np.float64]
Stepped = tuple[NDArray[np.uint8], NDArray[np.float16]]  # levels (out, in/g), steps (out, in/256)


class Move(NamedTuple):
    """What is added to the numbers of a base, and the sum of the sizes of its terms; float64 (out, in/g)."""

    by: Wide
    terms: Wide

    @classmethod
    def of(cls, a: NDArray[np.float32], b: NDArray[np.float32], scaling: float, groups: int) -> Move:
        """scaling · b a; a (r, in/pool), b (out, r)."""
        repeat = groups // a.shape[1]
        product = scaling * (b.astype(np.float64) @ a.astype(np.float64))
        terms = abs(scaling) * (np.abs(b).astype(np.float64) @ np.abs(a).astype(np.float64))
        return cls(np.repeat(product, repeat, axis=1), np.repeat(terms, repeat, axis=1))


def wrong_numbers(base: PackedAffine, merged: PackedAffine, adapter: ModuleAdapter) -> dict[str, int]:
    """How many offsets, and scales where they were trained, of a merged matrix are not base + adapter, by part."""
    if isinstance(base.levels, SymmetricLevels):
        return {"offset": base.offset.size}  # which nothing moves
    groups, wrong = base.scale.shape[1], dict[str, int]()
    move = Move.of(adapter.a.numpy(), adapter.b.numpy(), adapter.scaling, groups)
    if adapter.scales is not None:
        centre, spread = middle_of(unpack_codes(base.codes, base.bits).reshape(*base.scale.shape, -1))
        scale_a, scale_b = (part.numpy() for part in adapter.scales)
        turn = Move.of(scale_a, scale_b, adapter.scaling, groups)
        wrong["scale"] = _wrong("scale", base, merged, Move(turn.by / spread, turn.terms / spread))
        turned = centre * (merged.scale.astype(np.float64) - base.scale)
        move = Move(move.by - turned, move.terms + np.abs(turned))
    return wrong | {"offset": _wrong("offset", base, merged, move)}


def _wrong(part: str, base: PackedAffine, merged: PackedAffine, move: Move) -> int:
    if not isinstance(base.levels, Levels) or not isinstance(merged.levels, Levels):
        return wrong_halves(getattr(base, part), getattr(merged, part), move)
    one, other = ((getattr(side, part), getattr(side, f"{part}_step")) for side in (base.levels, merged.levels))
    move = Move(-move.by, move.terms) if part == "offset" else move  # its levels are those of −offset
    return wrong_levels(one, other, move, base.levels.grid)


def wrong_halves(base: NDArray[np.float16], merged: NDArray[np.float16], move: Move) -> int:
    """Numbers, (out, in/g), that are not float16(base + move)."""
    exact, slack = base.astype(np.float64) + move.by, FLOAT32_STEP * (np.abs(base).astype(np.float64) + move.terms)
    with np.errstate(over="ignore"):
        low, high = (exact - slack).astype(np.float16), (exact + slack).astype(np.float16)
    return int(np.count_nonzero(~((low <= merged) & (merged <= high))))


def wrong_levels(base: Stepped, merged: Stepped, move: Move, grid: SuperBlockGrid) -> int:
    """Steps and levels that are not those next to base + move."""
    steps, step = (side[1].astype(np.float64) for side in (base, merged))
    blocks = (*steps.shape, grid.groups)
    before, level = base[0].reshape(blocks) * steps[..., None], merged[0].reshape(blocks)
    wanted, slack = before + move.by.reshape(blocks), FLOAT32_STEP * (before + move.terms.reshape(blocks))
    largest, most = before.max(axis=-1), slack.max(axis=-1)
    first = np.where(largest > 0, steps / np.where(largest > 0, largest, 1), 1 / grid.top)  # per largest number

    def step_of(shift: Wide) -> Wide:
        with np.errstate(over="ignore"):
            found: NDArray[Any] = ((wanted.max(axis=-1) + shift).clip(0) * first).astype(np.float16)
        return found.astype(np.float64)

    wrong = int(np.count_nonzero(~((step_of(-most) <= step) & (step <= step_of(most)))))
    wide = np.where(step > 0, step, np.inf)[..., None]
    low, high = (np.rint((wanted + side * slack) / wide).clip(0, grid.top) for side in (-1, 1))
    return wrong + int(np.count_nonzero(~((low <= level) & (level <= high))))


def middle_of(codes: NDArray[np.uint8]) -> tuple[Wide, Wide]:
    """(mean, standard deviation but 1 at least) of the codes of each group, (out, in/g), rounded to float32.

    codes: (out, in/g, g).
    """
    spread = codes.std(axis=-1, dtype=np.float64).clip(min=1.0)
    found = (codes.mean(axis=-1, dtype=np.float64), spread)
    return found[0].astype(np.float32).astype(np.float64), found[1].astype(np.float32).astype(np.float64)
