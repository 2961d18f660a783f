"""The canonical numbers: codes, scale, offset; packing; exact comparison; counted narrowing. numpy only."""

from qalora_export.grid.exactness import Differences, difference, differing, grid_differences, packed_difference
from qalora_export.grid.group_affine import GROUP_SIZES, GroupAffine, centred, implied_offset
from qalora_export.grid.levels import AnyLevels, Levels, SymmetricLevels, factor, project
from qalora_export.grid.named import AFFINE16, BITS, GRIDS, NamedGrid, SuperBlockGrid, SymmetricGrid, grid_named
from qalora_export.grid.narrow import Narrowed, narrow
from qalora_export.grid.packed_affine import PackedAffine, assembled, fp16_is_finite, fp16_largest
from qalora_export.grid.packing import pack_codes, packed_width, unpack_codes

__all__ = [
    "AFFINE16",
    "BITS",
    "GRIDS",
    "GROUP_SIZES",
    "AnyLevels",
    "Differences",
    "GroupAffine",
    "Levels",
    "NamedGrid",
    "Narrowed",
    "PackedAffine",
    "SuperBlockGrid",
    "SymmetricGrid",
    "SymmetricLevels",
    "assembled",
    "centred",
    "difference",
    "differing",
    "factor",
    "fp16_is_finite",
    "fp16_largest",
    "grid_differences",
    "grid_named",
    "implied_offset",
    "narrow",
    "pack_codes",
    "packed_difference",
    "packed_width",
    "project",
    "unpack_codes",
]
