"""Read a GGUF file back into canonical numbers under Transformers names.

Nothing here shares code with the writer but the block types; tests judge those by gguf.quants as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.formats.contents import EMBEDDING
from qalora_export.formats.gguf.file import GgufFile, StoredTensor
from qalora_export.formats.gguf.names import SUFFIXES, NameMap
from qalora_export.formats.gguf.permute import hf_order
from qalora_export.formats.gguf.remainder import group_indicator, with_remainder
from qalora_export.formats.gguf.tensor_table import ROPE_FREQUENCIES, ROPE_LONG, ROPE_SHORT, as_stored
from qalora_export.formats.gguf.types import BLOCK_TYPES, PLAIN_TYPES
from qalora_export.formats.streaming import release, row_blocks
from qalora_export.grid import AFFINE16, GroupAffine, PackedAffine
from qalora_export.models.families import FAMILIES, MAX_LAYERS, Family
from qalora_export.safety.limits import parse_json

MODULES_KEY = "qalora.modules"  # JSON: module -> [bits, group_size], what the blocks alone do not tell


class GgufContents:
    """A GGUF file in the vocabulary of the checkpoint; matrices are decoded when asked for, one at a time.

    It is formats.contents.Contents, and: types: tensor name -> GGUF type; metadata. An implied offset is −z·s, or what
    a remainder in the adapter makes of it. An embedding is never a quantized matrix, whatever blocks hold it: the
    canonical form has none for it.
    """

    def __init__(self, path: Path, adapter: Path | None = None) -> None:
        self.path = path
        self._source = _Source(path)
        self._adapter = _Source(adapter) if adapter else None
        if self._adapter is not None:
            _check_adapter(self._adapter)
        self.metadata = self._source.metadata
        self.types = {name: tensor.kind for name, tensor in self._source.tensors.items()}
        in_blocks = {n for n, k in self.types.items() if k in BLOCK_TYPES}
        quantized = {n.removesuffix(".weight"): self.types[n] for n in self.types if n in in_blocks - {EMBEDDING}}
        declared = self._source.declared()
        self.modules = {m: declared.get(m, BLOCK_TYPES[kind].native()) for m, kind in quantized.items()}
        self.grids = {m: g for m, k in quantized.items() if (g := BLOCK_TYPES[k].grid) is not AFFINE16}
        plain = {n for n, k in self.types.items() if k in PLAIN_TYPES} | (in_blocks & {EMBEDDING})
        self.others = [name for name in self.types if name in plain]
        known = {*PLAIN_TYPES, *BLOCK_TYPES}
        self.opaque = {name: kind for name, kind in self.types.items() if kind not in known}
        self.optional = frozenset[str]()
        self.offset_is_implied = frozenset(m for m, k in quantized.items() if BLOCK_TYPES[k].zero is not None)

    def group_affine(self, module: str) -> GroupAffine:
        """The matrix of one module, rows in Transformers order. UnsafeInputError when blocks and metadata disagree."""
        return self.packed(module).unpack()

    def packed(self, module: str, rows: slice = slice(None)) -> PackedAffine:
        """Some rows of it, codes packed; their pages of the file do not stay in memory. Errors as in group_affine."""
        return self._packed(module, self.modules[module], rows)

    def native(self, module: str) -> PackedAffine:
        """The matrix in the blocks of any tensor, an embedding's too, as its type has it."""
        return self._packed(module, BLOCK_TYPES[self.types[f"{module}.weight"]].native(), slice(None))

    def blocks(self, name: str, rows: slice = slice(None)) -> PackedAffine | None:
        """Some rows of a plain tensor that is in blocks, an embedding, as its type has them; None for any other."""
        kind = BLOCK_TYPES.get(self.types[name]) if name in self.others else None
        return None if kind is None else self._packed(name.removesuffix(".weight"), kind.native(), rows)

    def _packed(self, module: str, declared: tuple[int, int], rows: slice) -> PackedAffine:
        source, tensor = self._source, self._source.tensors[f"{module}.weight"]
        kind, (bits, group_size) = BLOCK_TYPES[tensor.kind], declared
        heads = source.heads(module)
        wanted = rows if heads is None else hf_order(tensor.shape[0], heads)[rows]
        try:
            matrix = kind.unpack(np.ascontiguousarray(tensor.rows[wanted]), bits=bits, group_size=group_size)
        except (InputError, UnsafeInputError) as error:
            raise type(error)(error.what, where=f"{source.path}: {module}", why=error.why, fix=error.fix) from error
        release(tensor.rows)
        extra = self._adapter
        zero = kind.implied_zero(bits)
        if extra is not None and zero is not None and f"{module}.weight.lora_b" in extra.lora:
            return with_remainder(matrix, extra.remainder(module, group_size)[wanted], zero, where=extra.path)
        return matrix

    def shape(self, name: str) -> tuple[int, ...]:
        """(out, in) of a module, or the shape of another tensor."""
        return self._source.tensors[f"{name}.weight" if name in self.modules else name].shape

    def stored(self, name: str) -> tuple[str, int]:
        """dtype (GGUF type where there is none) and bytes of a tensor that is not quantized."""
        tensor = self._source.tensors[name]
        return PLAIN_TYPES[tensor.kind].dtype.name if tensor.kind in PLAIN_TYPES else tensor.kind, tensor.rows.nbytes

    def tensor(self, name: str, rows: slice = slice(None)) -> NDArray[Any]:
        """One tensor that is not quantized, in its stored dtype (vectors are F32 in GGUF), in Transformers order; an
        embedding in blocks as float32.

        Some of its rows, when asked for; what is returned may be a view of the mapped file.
        """
        if name not in self.others:
            raise InputError(f"the file has no plain tensor {name!r}", where=self._source.path)
        if self.types[name] in BLOCK_TYPES:
            return self.dequantized(name, rows)
        return self._source.plain(name, rows)

    def carried(self, name: str, tensor: NDArray[Any]) -> NDArray[Any]:
        """What this file must hold under `name` for a plain tensor of the checkpoint."""
        return as_stored(self._source.family, name, tensor)

    @property
    def rope_factors(self) -> dict[str, NDArray[np.float32]]:
        """GGUF name -> float32 (rotated features / 2,): divisors of the rotary frequencies that the file holds."""
        return self._source.rope_factors

    def dequantized(self, name: str, rows: slice = slice(None)) -> NDArray[np.float32]:
        """Rows of a tensor in any block type, float32, by gguf.quants.dequantize, in Transformers order.

        Raises InputError for a type that the gguf package cannot dequantize.
        """
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self._source.tensors[name]
        heads = self._source.heads(name.rpartition(".")[0])
        wanted = rows if heads is None else hf_order(tensor.shape[0], heads)[rows]
        stored = np.ascontiguousarray(tensor.rows[wanted])
        try:
            values: NDArray[np.float32] = dequantize(stored, GGMLQuantizationType(tensor.info.type))
        except NotImplementedError as error:
            raise InputError(f"no reader for type {tensor.kind}", where=f"{self.path}: {name}") from error
        release(tensor.rows)
        return values

    def matrices(self) -> Iterator[tuple[str, GroupAffine]]:
        for module in self.modules:
            yield module, self.group_affine(module)

    def tensors(self) -> Iterator[tuple[str, NDArray[Any]]]:
        for name in self.others:
            yield name, self.tensor(name)


def read_back(path: Path, adapter: Path | None = None) -> GgufContents:
    """Validate and open a GGUF file; `adapter`: the offset adapter of layout "split".

    Raises InputError for an unknown architecture, UnsafeInputError for a malformed file.
    """
    return GgufContents(path, adapter)


def runtime_dequantized(path: Path, adapter: Path | None = None) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """(module name, float32 (out, in)) of every quantized matrix, by gguf.quants.dequantize, in Transformers order.

    With the adapter of layout "split", lora_b · lora_a is added as llama.cpp does it to the outputs. Each column of
    the group indicator holds one 1, so that product and then the sum are rounded once in all.
    """
    source, extra = _Source(path), _Source(adapter) if adapter else None
    for name, tensor in source.tensors.items():
        if tensor.kind in PLAIN_TYPES:
            continue
        weight = tensor.dequantized()
        if extra is not None and f"{name}.lora_b" in extra.lora:
            weight = weight + extra.lora[f"{name}.lora_b"].values @ extra.lora[f"{name}.lora_a"].values
        yield name.removesuffix(".weight"), source.in_hf_order(name, weight)


class _Source:
    """One validated file: metadata, and tensors by Transformers name."""

    def __init__(self, path: Path) -> None:
        file = GgufFile(path)
        self.path, self.metadata = path, file.metadata
        self.family = self._family()
        self.names = _hf_names(self.family, self._number("block_count", MAX_LAYERS))
        self.tensors: dict[str, StoredTensor] = {}
        self.lora: dict[str, StoredTensor] = {}
        self.rope_factors: dict[str, NDArray[np.float32]] = {}
        self._indicators: set[str] = set()  # modules whose lora_a has been checked
        for name, tensor in file.tensors.items():
            base, _, part = name.rpartition(".")
            if part in ("lora_a", "lora_b"):
                self.lora[f"{self._hf_name(base)}.{part}"] = tensor
            elif name in (ROPE_FREQUENCIES, ROPE_LONG, ROPE_SHORT):
                self.rope_factors[name] = np.asarray(tensor.values, np.float32).reshape(-1)
            else:
                self.tensors[self._hf_name(name)] = tensor

    def plain(self, name: str, rows: slice = slice(None)) -> NDArray[Any]:
        stored = self.tensors[name].values
        heads = self.heads(name.rpartition(".")[0])
        values: NDArray[Any] = stored[rows if heads is None else hf_order(stored.shape[0], heads)[rows]]
        return values

    def remainder(self, module: str, group_size: int) -> NDArray[np.float32]:
        """lora_b of an offset adapter, rows in GGUF order. UnsafeInputError unless lora_a is the group indicator."""
        indicator, rest = (self.lora[f"{module}.weight.{part}"].values for part in ("lora_a", "lora_b"))
        if module not in self._indicators:
            groups = rest.shape[1]
            shaped = indicator.shape == (groups, groups * group_size)
            for rows in row_blocks(groups, indicator.nbytes) if shaped else ():
                shaped &= np.array_equal(indicator[rows], group_indicator(groups, group_size, rows))
                release(indicator)
            if not shaped:
                raise UnsafeInputError("not an offset adapter of this matrix", where=f"{self.path}: {module}")
            self._indicators.add(module)
        values: NDArray[np.float32] = rest
        return values

    def in_hf_order(self, name: str, rows: NDArray[Any]) -> NDArray[Any]:
        heads = self.heads(name.rpartition(".")[0])
        return rows if heads is None else rows[hf_order(rows.shape[0], heads)]

    def heads(self, module: str) -> int | None:
        shared = "attention.head_count_kv"  # absent: a key/value head for every head
        kv_heads = self._number(shared) if f"{self.family.gguf_arch}.{shared}" in self.metadata else None
        config = {"num_attention_heads": self._number("attention.head_count"), "num_key_value_heads": kv_heads}
        return self.family.permuted_heads(module, config)

    def declared(self) -> dict[str, tuple[int, int]]:
        """module -> (bits, group_size) as the exporter wrote it down; empty for files of other tools."""
        raw = self.metadata.get(MODULES_KEY)
        table = parse_json(raw.encode(), where=f"{self.path}: {MODULES_KEY}") if isinstance(raw, str) else {}
        entries = table.items() if isinstance(table, dict) else [("", table)]
        for module, entry in entries:
            if not (isinstance(entry, list) and len(entry) == 2 and all(type(n) is int and n > 0 for n in entry)):
                raise UnsafeInputError(f"{MODULES_KEY} holds no bits and group size", where=f"{self.path}: {module}")
        return {module: (entry[0], entry[1]) for module, entry in entries}

    def _family(self) -> Family:
        arch = self.metadata.get("general.architecture")
        for family in FAMILIES:
            if family.gguf_arch == arch:
                return family
        raise InputError(
            f"GGUF architecture {arch!r} is not supported",
            where=self.path,
            why=f"supported: {', '.join(f.gguf_arch for f in FAMILIES)}",
        )

    def _number(self, key: str, most: int = 2**20) -> int:
        value = self.metadata.get(f"{self.family.gguf_arch}.{key}")
        if type(value) is not int or not 0 < value <= most:
            raise UnsafeInputError(f"{self.family.gguf_arch}.{key} is {value!r}", where=self.path)
        return value

    def _hf_name(self, name: str) -> str:
        if name not in self.names:
            raise InputError("a tensor that this architecture does not have", where=f"{self.path}: {name}")
        return self.names[name]


def _hf_names(family: Family, layers: int) -> dict[str, str]:
    """GGUF tensor name -> Transformers tensor name."""
    names = NameMap(family.gguf_arch, layers)
    modules = family.required_modules({"num_hidden_layers": layers})
    return {names.to_gguf(module + suffix): module + suffix for module in modules for suffix in SUFFIXES}


def _check_adapter(source: _Source) -> None:
    kind = (source.metadata.get("general.type"), source.metadata.get("adapter.type"))
    if kind != ("adapter", "lora") or source.metadata.get("adapter.lora.alpha") != 0.0:
        raise UnsafeInputError(
            "not an offset adapter", where=source.path, why=f"types are {kind}; alpha must be 0, meaning scale 1"
        )
