"""Whether a checkpoint that is not there yet will fit into a GGUF file, and how large the file will be."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.forecast import Forecast
from qalora_export.formats.contents import FolderContents, check_tied_head
from qalora_export.formats.gguf.metadata import architecture
from qalora_export.formats.gguf.names import NameMap
from qalora_export.formats.gguf.tensor_table import plain_type
from qalora_export.formats.gguf.tokenizer.fields import tokenizer_entries
from qalora_export.formats.gguf.types import (
    BLOCK_TYPES,
    Q8_0,
    BlockType,
    base_type,
    check_group,
    no_exact_type,
    no_split,
)
from qalora_export.grid import SuperBlockGrid, unpack_codes
from qalora_export.models.families import family_of
from qalora_export.recipe import GgufSettings


def check_gguf(forecast: Forecast, settings: GgufSettings, trained: Collection[str]) -> int:
    """Bytes of the tensors `export_gguf` will write. trained: modules whose offsets training will move.

    Raises InputError as the export would: for the architecture, the tokenizer, names, types, group sizes, and codes
    with a free offset that no block type holds.
    """
    family = family_of(forecast.config)
    architecture(family, forecast.config)
    tokenizer_entries(forecast.path, forecast.config, allow_text_differences=settings.allow_text_differences)
    check_tied_head(forecast.folder)
    names, size = NameMap(family.gguf_arch, forecast.config["num_hidden_layers"]), 0
    optional = FolderContents(forecast.folder).optional
    for name, entry in forecast.plain.items():
        if name not in optional:
            names.to_gguf(name)
            size += _plain_bytes(forecast, name, entry.shape)
    for name, (bits, group) in forecast.modules.items():
        names.to_gguf(f"{name}.weight")
        if not isinstance(forecast.grid(name), SuperBlockGrid):
            check_group(group, where=f"{forecast.path}: {name}")
        size += _matrix_bytes(forecast, name, bits, group, settings, trained=name in trained)
    return size


def _plain_bytes(forecast: Forecast, name: str, shape: tuple[int, ...]) -> int:
    entry = forecast.embeddings.get(name.removesuffix(".weight"))
    if entry is None:
        return plain_type(forecast.folder, name).nbytes(shape)
    bits, _, grid = entry
    kind = BLOCK_TYPES[grid.gguf] if isinstance(grid, SuperBlockGrid) else None
    kind = kind or next((kind for kind in BLOCK_TYPES.values() if kind.holds_all(bits)), Q8_0)
    return kind.nbytes(shape)


def _matrix_bytes(
    forecast: Forecast, name: str, bits: int, group: int, settings: GgufSettings, *, trained: bool
) -> int:
    (out, width), where, grid = forecast.shapes[name], f"{forecast.path}: {name}", forecast.grid(name)
    if isinstance(grid, SuperBlockGrid):
        if settings.layout == "split":
            raise no_split(grid, where=where)
        return BLOCK_TYPES[grid.gguf].nbytes((out, width))
    if settings.layout == "split":
        groups = width // group  # lora_a (groups, in) and lora_b (out, groups), both float32
        exact = name in forecast.symmetric and not trained
        return base_type(bits).nbytes((out, width)) + (0 if exact else 4 * groups * (out + width))
    kind = next((kind for kind in BLOCK_TYPES.values() if kind.holds_all(bits)), None)
    kind = kind or next((kind for kind in BLOCK_TYPES.values() if _holds(kind, forecast, name, trained)), None)
    if kind is None:
        raise no_exact_type(bits, where=where)
    return kind.nbytes((out, width))


def _holds(kind: type[BlockType], forecast: Forecast, name: str, trained: bool) -> bool:
    """BlockType.holds of a matrix whose offset training will have made a free one, or that is not there yet."""
    bits, _ = forecast.modules[name]
    if bits not in kind.bits or (kind.zero is not None and trained):
        return False
    if isinstance(forecast.folder, CanonicalCheckpoint):
        matrix = forecast.folder.packed(name)
        if not trained:
            return kind.holds(matrix)
        codes = unpack_codes(matrix.codes, bits)
        low, high = int(np.min(codes)), int(np.max(codes))
    else:
        if kind.zero is not None and name not in forecast.symmetric:
            return False
        low, high = forecast.codes.get(name, (0, 2**bits - 1))
    return kind.first <= low and high < kind.first + 2**kind.code_bits
