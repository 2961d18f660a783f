"""Named grids: which scales and offsets a group may have, by the formats that hold them byte for byte.

    affine16   s, m any float16, for each group alone       GGUF Q4_1, Q4_0, Q8_0, …; MatMulNBits
    q4_k       s = d·k, m = −e·l in super-blocks of 256     GGUF Q4_K: codes of 4 bits, groups of 32, k and l of 6 bits
    q5_k       the same                                     GGUF Q5_K: codes of 5 bits, groups of 32, k and l of 6 bits
    q2_k       the same                                     GGUF Q2_K: codes of 2 bits, groups of 16, k and l of 4 bits
    q6_k       s = d·k, m = −32·s                           GGUF Q6_K: codes of 6 bits, groups of 16, k int8

A weight is s·q + m on every grid. On a grid of super-blocks d and e are float16 and belong to 256 in-features, k and l
are small unsigned integers, one of each for a group ("levels"). A product of 11 and 6 bits is exact in float32, and so
is that times a code: the weight still has one rounding, that of the sum. Source: ggml/src/ggml-common.h (block_q4_K),
ggml-quants.c (dequantize_row_q4_K: d·k, then e·l, then d·k·q − e·l).
"""

from __future__ import annotations

from dataclasses import dataclass

from qalora_export.errors import InputError

SUPER_BLOCK = 256  # in-features
FP16_BITS = 16
BITS = (2, 3, 4, 5, 6, 8)  # of codes


@dataclass(frozen=True, slots=True)
class NamedGrid:
    """A grid whose scales and offsets are float16, free for every group; any bits, any group size."""

    name: str

    def bits_per_weight(self, bits: int, group_size: int) -> float:
        """Codes, scale and offset."""
        return bits + 2 * FP16_BITS / group_size

    def divides(self, in_features: int, group_size: int) -> bool:
        """Whether rows of that width consist of whole groups."""
        return in_features % group_size == 0


@dataclass(frozen=True, slots=True)
class SuperBlockGrid(NamedGrid):
    """Super-blocks of 256. bits: of a code. group_size: in-features of a group. level_bits: of k and of l.

    gguf: the block type that holds it byte for byte.
    """

    bits: int
    group_size: int
    level_bits: int
    gguf: str

    @property
    def top(self) -> int:
        """The largest level."""
        return (1 << self.level_bits) - 1

    @property
    def groups(self) -> int:
        """Groups in a super-block."""
        return SUPER_BLOCK // self.group_size

    def bits_per_weight(self, bits: int, group_size: int) -> float:
        return self.bits + 2 * self.level_bits / self.group_size + 2 * FP16_BITS / SUPER_BLOCK

    def divides(self, in_features: int, group_size: int) -> bool:
        return in_features % SUPER_BLOCK == 0

    @property
    def symmetric(self) -> bool:
        """Whether the offset is −2^(bits−1)·scale, so that no adapter can move it."""
        return False


@dataclass(frozen=True, slots=True)
class SymmetricGrid(SuperBlockGrid):
    """Super-blocks with signed levels, and an offset that follows from the scale: w = d·k·(q − 2^(bits−1)), exact."""

    @property
    def top(self) -> int:
        return (1 << (self.level_bits - 1)) - 1

    @property
    def symmetric(self) -> bool:
        return True

    def bits_per_weight(self, bits: int, group_size: int) -> float:
        return self.bits + self.level_bits / self.group_size + FP16_BITS / SUPER_BLOCK


AFFINE16 = NamedGrid("affine16")
Q4_K = SuperBlockGrid("q4_k", bits=4, group_size=32, level_bits=6, gguf="Q4_K")
Q5_K = SuperBlockGrid("q5_k", bits=5, group_size=32, level_bits=6, gguf="Q5_K")
Q2_K = SuperBlockGrid("q2_k", bits=2, group_size=16, level_bits=4, gguf="Q2_K")
Q6_K = SymmetricGrid("q6_k", bits=6, group_size=16, level_bits=8, gguf="Q6_K")
GRIDS: dict[str, NamedGrid] = {grid.name: grid for grid in (AFFINE16, Q4_K, Q5_K, Q6_K, Q2_K)}


def grid_named(name: object, bits: int, group_size: int, *, where: str) -> NamedGrid:
    """The grid of that name. Raises InputError for an unknown one and for bits and groups that are not its own."""
    grid = GRIDS.get(name) if isinstance(name, str) else None
    if grid is None:
        raise InputError(f"there is no grid {name!r}"[:80], where=where, why=f"known: {', '.join(GRIDS)}")
    if isinstance(grid, SuperBlockGrid) and (bits, group_size) != (grid.bits, grid.group_size):
        raise InputError(
            f"grid {grid.name} has {grid.bits} bits in groups of {grid.group_size}, not {bits} in {group_size}",
            where=where,
        )
    return grid
