"""The canonical numbers: codes, scale, offset; packing; exact comparison; counted narrowing. numpy only."""

from qalora_export.grid.exactness import Differences, difference, differing
from qalora_export.grid.group_affine import BITS, GROUP_SIZES, GroupAffine
from qalora_export.grid.narrow import Narrowed, narrow
from qalora_export.grid.packed_affine import PackedAffine
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
    "narrow",
    "pack_codes",
    "packed_width",
    "unpack_codes",
]
