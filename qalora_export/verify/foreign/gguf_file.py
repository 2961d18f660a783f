"""A GGUF file of any tool: its tensors by the names that llama.cpp's own table gives the model's architecture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import InputError
from qalora_export.formats.gguf.file import GgufFile, StoredTensor
from qalora_export.formats.gguf.names import SUFFIXES, NameMap
from qalora_export.formats.gguf.permute import hf_order
from qalora_export.formats.gguf.tensor_table import ROPE_FREQUENCIES, ROPE_LONG, ROPE_SHORT
from qalora_export.formats.streaming import release
from qalora_export.models.families import Family, family_of
from qalora_export.verify.foreign.artifact import Foreign, Rows, Tensor

# Divisors of the rotary frequencies; the long ones (longrope) beyond the context that a model was first trained on.
ROTARY = (ROPE_FREQUENCIES, ROPE_LONG, ROPE_SHORT)


def rotary_divisors(path: Path) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
    """(by which the probes are rotated, those of long contexts), None where the file has none."""
    tensors = GgufFile(path).tensors
    short, long = (
        next((tensors[name].dequantized().reshape(-1) for name in names if name in tensors), None)
        for names in ((ROPE_FREQUENCIES, ROPE_SHORT), (ROPE_LONG,))
    )
    return short, long


def open_gguf(path: Path, config: Mapping[str, Any], source: set[str]) -> Foreign:
    """config: of the model the file claims to be; source: names of that model's tensors.

    Raises InputError for a file of another architecture, UnsafeInputError for a malformed one.
    """
    file, family = GgufFile(path), family_of(config)
    found = file.metadata.get("general.architecture")
    if found != family.gguf_arch:
        raise InputError(
            f"the file is of architecture {found!r}, the model of {family.gguf_arch!r}",
            where=path,
            why="every tensor would be another's",
            fix="give the folder of the model that the file was made from",
        )
    names = NameMap(family.gguf_arch, config["num_hidden_layers"])
    modules = [*family.required_modules({**config, "tie_word_embeddings": False})]
    expected = {
        known: module + suffix
        for module in modules
        for suffix in SUFFIXES
        if (known := _in_gguf(names, module + suffix)) is not None
    }
    tensors, extra = dict[str, Tensor](), list[str]()
    for name, stored in file.tensors.items():
        if name in expected:
            tensors[expected[name]] = _tensor(expected[name], stored, family, config)
        elif name not in ROTARY:
            extra.append(name)
    needed = {name for name in expected.values() if name in source}
    if family.ties_head(config):
        needed.discard("lm_head.weight")
    absent = tuple(sorted(needed - tensors.keys()))
    return Foreign(path, tensors, tuple(extra), absent, file.metadata)


def _in_gguf(names: NameMap, name: str) -> str | None:
    """None for a head where the architecture has none of its own (Gemma)."""
    try:
        return names.to_gguf(name)
    except InputError:
        if name.startswith("lm_head."):
            return None
        raise


def _tensor(name: str, stored: StoredTensor, family: Family, config: Mapping[str, Any]) -> Tensor:
    heads = family.permuted_heads(name.rpartition(".")[0], config)
    shift = family.norm_shift if name.endswith("norm.weight") else 0.0
    if heads is not None and stored.shape[0] % (2 * heads):
        heads = None  # rows that do not divide into heads have no order to change
    return Tensor(name, stored.info.name, stored.kind, stored.shape, _loader(stored, heads), heads, shift)


def _loader(stored: StoredTensor, heads: int | None) -> Any:
    order = None if heads is None else hf_order(stored.shape[0], heads)

    def load(rows: slice) -> Rows:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        if len(stored.shape) == 1:
            values = stored.dequantized()
            return values[rows] if order is None else values[order][rows]
        chosen = np.ascontiguousarray(stored.rows[rows if order is None else order[rows]])
        try:
            found = dequantize(chosen, GGMLQuantizationType(stored.info.type))
        except NotImplementedError as error:
            raise InputError(
                f"the gguf package cannot dequantize type {stored.kind}", where=stored.info.name
            ) from error
        release(stored.rows)
        return np.ascontiguousarray(found, np.float32).reshape(len(chosen), *stored.shape[1:])

    return load
