"""One layer of a checkpoint in GPTQ format, as its tensors have it.

For `in` × `out` features with G groups along in-features:

    qweight int32 (in·b/32, out)   codes; a column's words, one after the other, are one string of bits, low bit first
    qzeros  int32 (G, out·b/32)    zero points, packed the same way along out; see gptq_zeros
    scales  float (G, out)
    g_idx   int32 (in,)            group of each column

so at 3 bits a code may straddle two words. Read as bytes, a transposed qweight is grid.packing's layout. Every format
we write holds the columns of a group side by side: any g_idx will do that is constant over aligned runs of a group size
of ours, as with static groups, groups in another order, or a last group that is shorter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.errors import InputError
from qalora_export.grid import GROUP_SIZES, unpack_codes
from qalora_export.quantization.gptq_zeros import Rule, zero_points

PARTS = ("qweight", "qzeros", "scales", "g_idx")
INT32 = np.dtype(np.int32)
BITS = (2, 3, 4, 8)  # that the format has


@dataclass(frozen=True, slots=True)
class Layer:
    """What the shapes say. groups: rows of scales; group_size: the config's, or what divides in-features evenly."""

    out_features: int
    in_features: int
    bits: int
    groups: int
    group_size: int


@dataclass(frozen=True, slots=True)
class Stored:
    """codes uint8 (out, in), zeros uint8 (out, in/g), the true zero points, and scales (out, in/g) in their own dtype;
    g is a group size of ours.
    """

    codes: NDArray[np.uint8]
    zeros: NDArray[np.uint8]
    scales: NDArray[Any]
    bits: int


def check_layer(folder: ModelFolder, name: str, shape: tuple[int, int], gptq: Mapping[str, Any]) -> Layer:
    """Read the headers of one layer of shape (out, in). Raises InputError for shapes and dtypes that do not fit it."""
    out, width = shape
    where = f"{folder.path}: {name}"
    qweight, qzeros, scales = (folder.entry(f"{name}.{part}") for part in PARTS[:3])
    bits = qweight.shape[0] * 32 // width if len(qweight.shape) == 2 else 0
    groups = scales.shape[0] if len(scales.shape) == 2 else 0
    expected = ((width * bits // 32, out), (groups, out * bits // 32), (groups, out))
    whole = bits in BITS and width * bits % 32 == 0 == out * bits % 32 and 0 < groups <= width
    if not whole or (qweight.shape, qzeros.shape, scales.shape) != expected:
        raise InputError(
            f"qweight {qweight.shape}, qzeros {qzeros.shape}, scales {scales.shape} do not fit a layer of "
            f"{out} × {width}",
            where=where,
            fix="is this a GPTQ checkpoint of this model?",
        )
    for entry in (qweight, qzeros):
        if entry.dtype != INT32:
            raise InputError(f"packed in {entry.dtype}, expected int32", where=where)
    if bits != gptq.get("bits") and not gptq.get("dynamic"):
        raise InputError(f"the layer has {bits} bits, the config says {gptq.get('bits')}", where=where)
    said = gptq.get("group_size")
    size = width // groups if width % groups == 0 else said if type(said) is int and said > 0 else width
    if f"{name}.g_idx" not in folder and (gptq.get("desc_act") or -(-width // size) != groups):
        raise InputError("desc_act without g_idx", where=f"{where}.g_idx", fix="the checkpoint is incomplete")
    return Layer(out, width, bits, groups, size)


def written_grid(folder: ModelFolder, name: str, layer: Layer) -> tuple[int, int]:
    """(bits, group size as we write it) of one layer; codes are not read. Raises InputError for activation order."""
    runs = _group_of_runs(group_of_columns(folder, name, layer), where=f"{folder.path}: {name}.g_idx")
    return layer.bits, layer.in_features // len(runs)


def read_layer(folder: ModelFolder, name: str, layer: Layer, rule: Rule) -> Stored:
    """Unpack one layer; its zero points are undone by `rule`. Raises InputError for activation order."""
    qweight, qzeros, scales = (np.asarray(folder.tensor(f"{name}.{part}")) for part in PARTS[:3])
    first = _group_of_runs(group_of_columns(folder, name, layer), where=f"{folder.path}: {name}.g_idx")
    zeros = zero_points(qzeros, layer.bits, rule)[first].T
    return Stored(unpack_columns(qweight, layer.bits), zeros, scales[first].T, layer.bits)


def unpack_columns(words: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """qweight int32 (in·b/32, out) -> codes uint8 (out, in)."""
    return unpack_codes(np.ascontiguousarray(words.T).astype("<i4").view(np.uint8), bits)


def group_of_columns(folder: ModelFolder, name: str, layer: Layer) -> NDArray[np.int64]:
    """The group of each column, int64 (in,). Raises InputError for a g_idx that points outside of the groups."""
    if f"{name}.g_idx" not in folder:
        return np.arange(layer.in_features) // layer.group_size
    order = np.asarray(folder.tensor(f"{name}.g_idx"))
    if order.shape != (layer.in_features,) or order.dtype.kind != "i" or order.min() < 0 or order.max() >= layer.groups:
        raise InputError(
            f"g_idx does not give {layer.in_features} columns one of {layer.groups} groups each",
            where=f"{folder.path}: {name}.g_idx",
            fix="fetch or make the checkpoint again",
        )
    return order.astype(np.int64)


def _group_of_runs(order: NDArray[np.int64], *, where: str) -> NDArray[np.int64]:
    """The group of each run of columns, int64 (in/g,), for the largest of our group sizes g that runs have."""
    for size in reversed(GROUP_SIZES):
        if len(order) % size == 0 and (order.reshape(-1, size) == order[::size, None]).all():
            return order[::size]
    longest = int(np.diff(np.flatnonzero(np.diff(order, prepend=-1, append=-1))).max())
    if (np.diff(order) >= 0).all():
        raise InputError(f"groups of {longest} columns are no multiple of {GROUP_SIZES[0]}", where=where)
    raise InputError(
        "the columns of a group do not lie together (desc_act, activation order)",
        where=where,
        why="every format we write holds the columns of a group side by side",
        fix="quantize the source model again with desc_act=False, or with static_groups=True, or here",
    )
