"""What an artifact holds, whatever its format, and the one comparison of two of them.

A canonical checkpoint, a GGUF file, an ONNX folder, an adapter and a plain model folder answer the same questions in
the same vocabulary: quantized matrices by module name, other tensors by Transformers' name. So one function reads an
export back, counts what a merge changed, judges gate G0 and answers `inspect FILE OTHER`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import PARTS, CanonicalCheckpoint
from qalora_export.checkpoint.model_folder import ModelFolder, as_float32
from qalora_export.errors import InputError, QaloraError
from qalora_export.formats.same_blocks import same_blocks
from qalora_export.formats.streaming import prepared, release, row_blocks
from qalora_export.grid import AFFINE16, Differences, NamedGrid, PackedAffine, differing, grid_differences
from qalora_export.models.families import family_of
from qalora_export.progress import track

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DERIVED = ".rotary_emb.inv_freq"  # a buffer of old checkpoints; it follows from config.json and no runtime reads it
POSITIVE_ZERO = np.float16(0)  # x + 0 turns −0 into +0 and leaves every other value alone
NONE, ALL = Differences(0, 0, 0), slice(None)


class Contents(Protocol):
    """An artifact in the checkpoint's vocabulary; nothing is loaded until it is asked for.

    modules: module -> (bits, group_size) of every quantized matrix. grids: of those on a grid of super-blocks. others:
    names of tensors that are not quantized. opaque: name -> type of tensors in a type without a canonical form, which
    are in neither. offset_is_implied: modules whose offset is not stored but follows from the scale, so that −0 and +0
    cannot be told apart. optional: tensors that an artifact of another format need not hold.
    """

    @property
    def modules(self) -> Mapping[str, tuple[int, int]]: ...
    @property
    def grids(self) -> Mapping[str, NamedGrid]: ...
    @property
    def others(self) -> Collection[str]: ...
    @property
    def opaque(self) -> Mapping[str, str]: ...
    @property
    def offset_is_implied(self) -> frozenset[str]: ...
    @property
    def optional(self) -> frozenset[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """(out, in) of a module, or the shape of another tensor."""

    def stored(self, name: str) -> tuple[str, int]:
        """dtype and bytes of a tensor that is not quantized."""

    def packed(self, module: str, rows: slice = ALL) -> PackedAffine:
        """Some rows of a quantized matrix. Raises InputError or UnsafeInputError when it holds no canonical numbers."""

    def tensor(self, name: str, rows: slice = ALL) -> NDArray[Any]:
        """Some rows of another tensor, in the dtype it is stored in."""

    def carried(self, name: str, tensor: NDArray[Any]) -> NDArray[Any]:
        """What this artifact must hold for a tensor of a checkpoint: itself, unless the format defines it otherwise."""


class FolderContents:
    """A model folder, canonical or not, as Contents."""

    def __init__(self, folder: ModelFolder) -> None:
        self.folder = folder
        self.modules: Mapping[str, tuple[int, int]] = {}
        self.grids: Mapping[str, NamedGrid] = {}
        self.others: list[str] = folder.names()
        if isinstance(folder, CanonicalCheckpoint):
            self.modules, self.others = folder.modules, folder.plain_names()
            self.grids = {name: grid for name, grid in folder.grids.items() if grid is not AFFINE16}
        self.opaque: Mapping[str, str] = {}
        self.offset_is_implied = frozenset[str]()
        tied = {HEAD} if ties_head(folder.config) else set()
        self.optional = frozenset(name for name in self.others if name.endswith(DERIVED) or name in tied)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.modules:
            return self.folder.entry(name).shape
        out, groups = self.folder.entry(f"{name}.scale").shape
        return out, groups * self.modules[name][1]

    def stored(self, name: str) -> tuple[str, int]:
        entry, module = self.folder.entry(name), name.removesuffix(".weight")
        if isinstance(self.folder, CanonicalCheckpoint) and module in self.folder.embeddings:
            bits, group, grid = self.folder.embeddings[module]
            size = int(math.prod(entry.shape) * grid.bits_per_weight(bits, group) / 8)
            return (f"{bits} bit, g {group}" if grid is AFFINE16 else grid.name), size
        return entry.dtype.name, entry.nbytes

    def packed(self, module: str, rows: slice = ALL) -> PackedAffine:
        if not isinstance(self.folder, CanonicalCheckpoint):
            raise InputError("this folder holds no quantized matrices", where=f"{self.folder.path}: {module}")
        return self.folder.packed(module, rows)

    def tensor(self, name: str, rows: slice = ALL) -> NDArray[Any]:
        return self.folder.rows(name, rows)

    def carried(self, name: str, tensor: NDArray[Any]) -> NDArray[Any]:
        return tensor

    def blocks(self, name: str, rows: slice = ALL) -> PackedAffine | None:
        module = name.removesuffix(".weight")
        in_blocks = isinstance(self.folder, CanonicalCheckpoint) and module in self.folder.embeddings
        return self.packed(module, rows) if in_blocks else None


def ties_head(config: Mapping[str, Any]) -> bool:
    """Whether config.json says that lm_head is the embedding matrix."""
    try:
        return family_of(config).ties_head(config)
    except InputError:  # an architecture that we can show but not export
        return bool(config.get("tie_word_embeddings"))


def exported_names(checkpoint: CanonicalCheckpoint) -> list[str]:
    """Other tensors that an export must hold: all but derived buffers and a tied lm_head, which is the embedding.

    Raises InputError when config.json ties the two and their values differ.
    """
    contents = FolderContents(checkpoint)
    check_tied_head(checkpoint)
    return [name for name in contents.others if name not in contents.optional]


def check_tied_head(folder: ModelFolder) -> None:
    """Raise InputError when config.json ties lm_head to the embedding and the folder holds two that differ."""
    contents = FolderContents(folder)
    same_dtype = HEAD not in folder or folder.entry(HEAD).dtype == folder.entry(EMBEDDING).dtype
    if HEAD in contents.optional and (not same_dtype or _tensor_difference(contents, HEAD, contents, EMBEDDING)):
        raise InputError(
            "config.json ties lm_head to the embedding, the weights differ",
            where=folder.path,
            fix="set tie_word_embeddings to false",
        )


@dataclass
class Comparison:
    """What differs between two artifacts, left and right; in a clean comparison every table is empty.

    compared: how many matrices and tensors both hold. values: how many values the left one holds. matrices, tensors:
    name -> what differs. reasons: matrix -> why it counts as differing in all its values. only_left: name -> number of
    values.
    """

    compared: int = 0
    values: int = 0
    matrices: dict[str, Differences] = field(default_factory=dict)
    tensors: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    only_left: dict[str, int] = field(default_factory=dict)
    only_right: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return not (self.matrices or self.tensors or self.only_left or self.only_right)

    @property
    def total(self) -> int:
        """Differing values; a missing tensor counts with all of its own, a surplus one as one."""
        return sum(self.findings().values())

    @property
    def changes(self) -> Differences:
        """The sum over all matrices that both hold."""
        return sum(self.matrices.values(), NONE)

    def findings(self) -> dict[str, int]:
        """ "tensor part" -> differing values, matrices first."""
        found: dict[str, int] = {}
        for module, counts in self.matrices.items():
            if module in self.reasons:
                found[f"{module} ({self.reasons[module]})"] = counts.total
            else:
                found |= {f"{module}.{part}": count for part in PARTS if (count := getattr(counts, part))}
        found |= self.tensors
        found |= {f"{name} (missing)": count for name, count in self.only_left.items()}
        return found | {f"{name} (surplus, or stored otherwise)": 1 for name in self.only_right}

    def describe(self) -> str:
        """The first few findings."""
        lines = [f"{name}: {count}" for name, count in self.findings().items()]
        return "; ".join(lines[:5]) + ("; …" if len(lines) > 5 else "")


def compare(left: Contents, right: Contents, *, progress: str = "") -> Comparison:
    """Count what differs, bit for bit, in constant memory. progress: description of a progress bar, if any.

    Three things are not differences: −0 for +0 in an offset that one side does not store, a tensor held in a wider
    float than the other side's, and, between two formats, a tensor that one of them need not hold.
    """
    found = Comparison()
    other_format = type(left) is not type(right)
    _compare_matrices(left, right, found, progress)
    for name in left.others:
        if name in right.others:
            found.compared += 1
            if count := _tensor_difference(left, name, right, name):
                found.tensors[name] = count
        elif not (other_format and name in left.optional):
            found.only_left[name] = max(1, math.prod(left.shape(name)))
        else:
            continue
        found.values += math.prod(left.shape(name))
    found.only_left |= dict.fromkeys(left.opaque, 1)
    optional = right.optional if other_format else frozenset()
    known = {*left.modules, *left.others, *optional}
    found.only_right = [n for n in (*right.modules, *right.others, *right.opaque) if n not in known]
    return found


def _compare_matrices(left: Contents, right: Contents, found: Comparison, progress: str) -> None:
    shared = [module for module in left.modules if module in right.modules]
    answers = prepared(
        lambda job: _matrix_difference(left, right, *job),
        ((module, rows) for module in shared for rows in _row_blocks(left, module)),
    )
    for module in track(shared, progress) if progress else shared:
        total = NONE
        for rows in _row_blocks(left, module):
            answer = next(answers)
            if isinstance(answer, str):
                found.reasons[module] = answer
                answer = _all_values(left, module, rows)
            total += answer
        if total.total:
            found.matrices[module] = total
    found.compared += len(shared)
    for module in left.modules:
        count = _all_values(left, module, ALL).total
        found.values += count
        if module not in right.modules:
            found.only_left[module] = count


def _row_blocks(contents: Contents, module: str) -> Iterator[slice]:
    rows, columns = contents.shape(module)
    return row_blocks(rows, rows * columns * contents.modules[module][0] // 8)


def _all_values(contents: Contents, module: str, rows: slice) -> Differences:
    """How many codes, scales and offsets those rows hold."""
    total, columns = contents.shape(module)
    count, groups = len(range(total)[rows]), columns // contents.modules[module][1]
    return Differences(count * columns, count * groups, count * groups)


def _matrix_difference(left: Contents, right: Contents, module: str, rows: slice) -> Differences | str:
    """What differs in those rows, or why they cannot be compared. Codes are unpacked only where their bytes differ."""
    bits, group_size = right.modules[module]
    if left.modules[module] != (bits, group_size) or left.shape(module) != right.shape(module):
        return f"it is {right.shape(module)} of {bits} bits in groups of {group_size}"
    want = left.packed(module, rows)
    try:
        got = right.packed(module, rows)
    except QaloraError as error:
        return f"unreadable: {error.what}"
    if want.scale.dtype != got.scale.dtype:
        return f"it is on another grid, {got.grid.name}"
    codes = 0 if _same_bytes(want.codes, got.codes) else differing(want.unpack().codes, got.unpack().codes)
    if module in left.offset_is_implied or module in right.offset_is_implied:
        offsets = want.offset + POSITIVE_ZERO, got.offset + POSITIVE_ZERO
        return Differences(codes, differing(want.scale, got.scale), differing(*offsets))
    return Differences(codes, *grid_differences(want, got))


def _same_bytes(left: NDArray[np.uint8], right: NDArray[np.uint8]) -> bool:
    """Whether two arrays (rows, bytes) are equal, eight bytes at a time where rows are whole words."""
    words = np.uint64 if left.shape == right.shape and not left.shape[1] % 8 else np.uint8
    return np.array_equal(np.ascontiguousarray(left).view(words), np.ascontiguousarray(right).view(words))


def _tensor_difference(left: Contents, name: str, right: Contents, other: str) -> int:
    """Differing values of one tensor, by blocks of rows whose pages are given back."""
    shape = left.shape(name)
    if right.shape(other) != shape:
        return max(1, math.prod(shape))
    count = 0
    for rows in row_blocks(shape[0], 4 * math.prod(shape)) if shape else [ALL]:
        if same_blocks(left, name, right, other, rows):
            continue
        want, got = left.tensor(name, rows), right.tensor(other, rows)
        if type(left) is type(right):
            count += values_differing(want, got)
        else:
            count += values_differing(right.carried(other, want), left.carried(name, got))
        release(want)
        release(got)
    return count


def values_differing(left: NDArray[Any], right: NDArray[Any]) -> int:
    """Values that differ in their bits; where dtypes differ, after widening, which is exact for floats."""
    if left.dtype == right.dtype:
        return differing(left, right)
    if all(side.dtype.itemsize <= 4 and side.dtype.kind not in "iub" for side in (left, right)):
        return differing(as_float32(left), as_float32(right))
    wide_l, wide_r = left.astype(np.float64), right.astype(np.float64)
    return int(np.count_nonzero((wide_l != wide_r) & ~(np.isnan(wide_l) & np.isnan(wide_r))))
