"""What goes into a GGUF file, tensor by tensor, before a byte is written: name, type, shape and how to load it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.model_folder import ModelFolder, as_float32
from qalora_export.errors import InputError
from qalora_export.formats.contents import exported_names
from qalora_export.formats.gguf.names import NameMap
from qalora_export.formats.gguf.permute import row_order
from qalora_export.formats.gguf.plain_blocks import blocks_of, lies_on_blocks
from qalora_export.formats.gguf.types import (
    F32,
    PLAIN_TYPES,
    Q8_0,
    BlockType,
    GgufType,
    base_type,
    check_group,
    exact_type,
    no_split,
)
from qalora_export.grid import AFFINE16
from qalora_export.models.families import Family, family_of, rope_of
from qalora_export.models.families.family import head_dim

ROPE_FREQUENCIES = "rope_freqs.weight"
ROPE_SHORT, ROPE_LONG = "rope_factors_short.weight", "rope_factors_long.weight"


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """name: in GGUF; kind: its type; shape: elements, row-major; load: those rows as stored (uint8 for blocks)."""

    name: str
    kind: type[GgufType]
    shape: tuple[int, ...]
    load: Callable[[slice], NDArray[Any]]

    @property
    def nbytes(self) -> int:
        return self.kind.nbytes(self.shape)


def plan_model(checkpoint: CanonicalCheckpoint, layout: str) -> list[TensorPlan]:
    """Every tensor of the model in one layout: "q4_1" (each by itself, in blocks of its grid) or "split" (bases, whose
    offsets go elsewhere).

    Raises InputError for what GGUF cannot hold exactly or does not name.
    """
    family = family_of(checkpoint.config)
    _check_complete(checkpoint, family)
    names = NameMap(family.gguf_arch, checkpoint.config["num_hidden_layers"])
    plans = _rope_factors(checkpoint, family)
    plans += [_plain(checkpoint, family, names, name) for name in exported_names(checkpoint)]
    plans += [_quantized(checkpoint, family, names, module, layout) for module in checkpoint.modules]
    if len({plan.name for plan in plans}) != len(plans):
        raise InputError("two tensors would get the same GGUF name", where=checkpoint.path)
    return plans


def prevailing_type(plans: list[TensorPlan]) -> type[GgufType]:
    """The type that holds most elements of the matrices in decoder layers."""
    totals: dict[type[GgufType], int] = {}
    for plan in plans:
        if plan.name.startswith("blk.") and len(plan.shape) == 2:
            totals[plan.kind] = totals.get(plan.kind, 0) + math.prod(plan.shape)
    return max(totals, key=lambda kind: totals[kind])


def gguf_order(checkpoint: CanonicalCheckpoint, family: Family, module: str, rows: slice) -> slice | NDArray[np.intp]:
    """Rows `rows` of a quantized matrix, counted in GGUF order, as rows of the checkpoint."""
    heads = family.permuted_heads(module, checkpoint.config)
    return rows if heads is None else row_order(checkpoint.entry(f"{module}.scale").shape[0], heads)[rows]


def _quantized(checkpoint: CanonicalCheckpoint, family: Family, names: NameMap, module: str, layout: str) -> TensorPlan:
    kind = _matrix_type(checkpoint, module, layout)
    rows, groups = checkpoint.entry(f"{module}.scale").shape

    def load(wanted: slice) -> NDArray[Any]:
        return kind.pack(checkpoint.packed(module, gguf_order(checkpoint, family, module, wanted)))

    return TensorPlan(names.to_gguf(f"{module}.weight"), kind, (rows, groups * checkpoint.modules[module][1]), load)


def _matrix_type(checkpoint: CanonicalCheckpoint, module: str, layout: str) -> type[BlockType]:
    (bits, group_size), where = checkpoint.modules[module], f"{checkpoint.path}: {module}"
    grid = checkpoint.grids[module]
    if layout == "split" and grid is not AFFINE16:
        raise no_split(grid, where=where)
    if grid is AFFINE16:
        check_group(group_size, where=where)
    if layout == "split":
        return base_type(bits)
    return exact_type(bits, lambda: checkpoint.packed(module), where=where, grid=grid)


def _plain(checkpoint: CanonicalCheckpoint, family: Family, names: NameMap, name: str) -> TensorPlan:
    """A tensor that is not quantized: see plain_type. From any of three dtypes F32 is exact."""
    entry = checkpoint.entry(name)
    if (module := name.removesuffix(".weight")) in checkpoint.embeddings:
        return _embedding(checkpoint, names, module)
    kind = plain_type(checkpoint, name)
    heads = family.permuted_heads(name.rpartition(".")[0], checkpoint.config)

    def load(wanted: slice) -> NDArray[Any]:
        tensor = checkpoint.tensor(name)
        tensor = tensor[wanted] if heads is None else tensor[row_order(tensor.shape[0], heads)[wanted]]
        if kind is Q8_0:
            return blocks_of(tensor)
        return as_stored(family, name, as_float32(tensor)) if kind is F32 else tensor

    return TensorPlan(names.to_gguf(name), kind, entry.shape, load)


def _embedding(checkpoint: CanonicalCheckpoint, names: NameMap, module: str) -> TensorPlan:
    """An embedding in blocks goes across as these."""
    kind, shape = embedding_type(checkpoint, module), checkpoint.entry(f"{module}.weight").shape
    return TensorPlan(
        names.to_gguf(f"{module}.weight"), kind, shape, lambda rows: kind.pack(checkpoint.packed(module, rows))
    )


def embedding_type(checkpoint: CanonicalCheckpoint, module: str) -> type[BlockType]:
    """The block type of an embedding in blocks. Raises InputError where none holds it."""
    bits, _, grid = checkpoint.embeddings[module]
    where = f"{checkpoint.path}: {module}"
    return exact_type(bits, lambda: checkpoint.packed(module), where=where, grid=grid)


def plain_type(folder: ModelFolder, name: str) -> type[GgufType]:
    """The type of a tensor that is not quantized: its own for a matrix, F32 for a vector, Q8_0 for an embedding whose
    numbers are such blocks already (plain_blocks). InputError without one.
    """
    entry = folder.entry(name)
    same = next((kind for kind in PLAIN_TYPES.values() if kind.dtype == entry.dtype), None)
    if same is None or len(entry.shape) not in (1, 2):
        raise InputError(
            f"{entry.dtype}{entry.shape} has no exact GGUF type",
            where=f"{folder.path}: {name}",
            why="expected a matrix or vector of F32, F16 or BF16",
        )
    if lies_on_blocks(folder, name):
        return Q8_0
    return F32 if len(entry.shape) == 1 else same


def as_stored(family: Family, name: str, tensor: NDArray[Any]) -> NDArray[Any]:
    """What GGUF holds for a plain tensor: norms of a family with a shift as float32(w + shift), the rest as it is."""
    if family.norm_shift and name.endswith("norm.weight"):
        shifted: NDArray[np.float32] = as_float32(tensor) + np.float32(family.norm_shift)
        return shifted
    return tensor


def _rope_factors(checkpoint: CanonicalCheckpoint, family: Family) -> list[TensorPlan]:
    """Divisors of the rotary frequencies, where the scaling has any; float32 (rotated features / 2,)."""
    rope = rope_of(checkpoint.config, family.rope_types)
    factors = rope.frequency_factors(head_dim(checkpoint.config))
    tables = {} if factors is None else {ROPE_FREQUENCIES: factors}
    if rope.kind == "longrope":
        tables = {ROPE_LONG: np.array(rope.long, np.float32), ROPE_SHORT: np.array(rope.short, np.float32)}
    return [TensorPlan(name, F32, values.shape, values.__getitem__) for name, values in tables.items()]


def _check_complete(checkpoint: CanonicalCheckpoint, family: Family) -> None:
    config: Mapping[str, Any] = checkpoint.config
    for module in family.required_modules(config):
        if module not in checkpoint.modules and f"{module}.weight" not in checkpoint:
            raise InputError(
                f"the checkpoint has no weight for {module}",
                where=checkpoint.path,
                why="config.json says it must",
                fix="is the download complete?",
            )
    expected = (config["vocab_size"], config["hidden_size"])
    if checkpoint.entry("model.embed_tokens.weight").shape != expected:
        raise InputError(
            f"the embedding is not {expected}",
            where=f"{checkpoint.path}: model.embed_tokens.weight",
            why="vocab_size and hidden_size of config.json",
        )
