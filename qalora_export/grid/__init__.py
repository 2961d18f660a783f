"""The canonical numbers: codes, scale, offset; packing; exact comparison; counted narrowing. numpy only."""

from qalora_export.grid.exactness import Differences, difference, differing, packed_difference
from qalora_export.grid.group_affine import BITS, GROUP_SIZES, GroupAffine, implied_offset
from qalora_export.grid.narrow import Narrowed, narrow
from qalora_export.grid.packed_affine import PackedAffine, fp16_is_finite, fp16_largest
from qalora_export.grid.packing import pack_codes, packed_width, unpack_codes

__all__ = [
    "BITS",
    "GROUP_SIZES",
    "Differences",
    "GroupAffine",
    "Narrowed",
    "PackedAffine",
    "difference",
    "differing",
    "fp16_is_finite",
    "fp16_largest",
    "implied_offset",
    "narrow",
    "pack_codes",
    "packed_difference",
    "packed_width",
    "unpack_codes",
]
