"""Reader and writer of canonical checkpoints (quant_method "qalora").

On disk a quantized module `M` is three tensors beside each other:

    M.codes   U8   (out, in·bits/8)   packed, see grid.packing
    M.scale   F16  (out, in/g)
    M.offset  F16  (out, in/g)

and config.json says per module how to read them:

    "quantization_config": {"quant_method": "qalora", "version": 1,
                            "modules": {"model.layers.0.self_attn.q_proj": {"bits": 4, "group_size": 32}, ...}}

On a grid of super-blocks (`"grid": "q4_k"` in the module's entry) `M` is five tensors:

    M.codes        U8   (out, in·bits/8)   packed
    M.scale        U8   (out, in/g)        levels: scale = scale_step · level
    M.offset       U8   (out, in/g)        levels: offset = −offset_step · level
    M.scale_step   F16  (out, in/256)
    M.offset_step  F16  (out, in/256)

and on a symmetric one (`"grid": "q6_k"`) three: M.codes, M.scale I8 (out, in/g) and M.scale_step. An embedding may be
stored so too (`"embeddings"` beside `"modules"`); to a reader it is still a plain float32 tensor, `M.weight`, whose
rows are made when asked for.

Everything else is stored under its own name in its source dtype, bit for bit.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.checkpoint.safetensors_file import TensorEntry
from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.grid import (
    AFFINE16,
    BITS,
    GroupAffine,
    NamedGrid,
    PackedAffine,
    SuperBlockGrid,
    SymmetricGrid,
    assembled,
    centred,
    grid_named,
    packed_width,
)

QUANT_METHOD = "qalora"
VERSION = 1
PARTS = ("codes", "scale", "offset")
STEPS = ("scale_step", "offset_step")
SYMMETRIC_PARTS = ("codes", "scale", "scale_step")
FLOAT32, WEIGHT = np.dtype(np.float32), ".weight"


def parts_of(grid: NamedGrid) -> tuple[str, ...]:
    """Last names of the tensors of a matrix on that grid."""
    if isinstance(grid, SymmetricGrid):
        return SYMMETRIC_PARTS
    return PARTS + STEPS if isinstance(grid, SuperBlockGrid) else PARTS


def values_of(matrix: GroupAffine) -> NDArray[np.float32]:
    """What an embedding in blocks is to a reader, float32 (out, in): as runtimes read its blocks."""
    return centred(matrix) if isinstance(matrix.grid, SymmetricGrid) else matrix.dequantize()


def is_canonical(folder: Path) -> bool:
    """Whether a model folder's config.json says that it is a canonical checkpoint. Errors as of ModelFolder."""
    raw = ModelFolder(folder).config.get("quantization_config")
    return isinstance(raw, dict) and raw.get("quant_method") == QUANT_METHOD


class CanonicalCheckpoint(ModelFolder):
    """A canonical checkpoint, opened for streaming. `modules` maps module name to (bits, group_size), `grids` to its
    grid. `embeddings`: those three of embeddings that are stored in blocks; these are no modules but plain tensors.
    """

    def __init__(self, path: Path | str) -> None:
        super().__init__(path)
        raw = self.config.get("quantization_config")
        if not isinstance(raw, dict) or raw.get("quant_method") != QUANT_METHOD:
            raise InputError(
                "not a canonical checkpoint",
                where=self.path,
                why=f"config.json has no quantization_config with quant_method {QUANT_METHOD!r}",
                fix="run `qalora-export quantize` on the model first",
            )
        if raw.get("version") != VERSION:
            raise InputError(
                f"checkpoint version {raw.get('version')!r} is unknown", where=self.path, fix="update qalora-export"
            )
        modules = raw.get("modules")
        if not isinstance(modules, dict):
            raise UnsafeInputError("quantization_config.modules is not a table", where=self.path)
        checked = {name: self._checked(name, value) for name, value in modules.items()}
        self.modules = {name: (bits, group) for name, (bits, group, _) in checked.items()}
        self.grids = {name: grid for name, (_, _, grid) in checked.items()}
        embeddings = raw.get("embeddings", {})
        if not isinstance(embeddings, dict):
            raise UnsafeInputError("quantization_config.embeddings is not a table", where=self.path)
        self.embeddings = {name: self._checked(name, value) for name, value in embeddings.items()}

    def __contains__(self, name: str) -> bool:
        return self._embedding(name) is not None or super().__contains__(name)

    def entry(self, name: str) -> TensorEntry:
        """Of an embedding in blocks: what it is to a reader, float32 (out, in)."""
        module = self._embedding(name)
        if module is None:
            return super().entry(name)
        rows, groups = super().entry(f"{module}.scale").shape
        return TensorEntry(FLOAT32, (rows, groups * self.embeddings[module][1]), 0)

    def tensor(self, name: str) -> NDArray[Any]:
        return self.rows(name) if self._embedding(name) is not None else super().tensor(name)

    def rows(self, name: str, rows: slice | NDArray[np.intp] = slice(None)) -> NDArray[Any]:
        module = self._embedding(name)
        return super().rows(name, rows) if module is None else values_of(self.packed(module, rows).unpack())

    def _embedding(self, name: str) -> str | None:
        """The embedding in blocks that a tensor is the weight of."""
        module = name.removesuffix(WEIGHT)
        return module if module != name and module in self.embeddings else None

    def group_affine(self, module: str) -> GroupAffine:
        """The quantized matrix of one module, unpacked in memory."""
        with self._located(module):
            return self.packed(module).unpack()

    def packed(self, module: str, rows: slice | NDArray[np.intp] = slice(None)) -> PackedAffine:
        """Some rows of a module's matrix, codes still packed; only the pages of those rows are read."""
        bits, group_size, grid = self.embeddings.get(module) or (*self.modules[module], self.grids[module])
        codes, *numbers = (np.asarray(self.tensor(f"{module}.{part}")[rows]) for part in parts_of(grid))
        with self._located(module):
            return assembled(grid, bits, group_size, codes, *numbers)

    @contextlib.contextmanager
    def _located(self, module: str) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            if error.where:
                raise
            where = f"{self.path}: {module}"
            raise InputError(error.what, where=where, why=error.why, fix="re-create it") from error

    def plain_names(self) -> list[str]:
        """Names of the tensors that are not part of a quantized module, in file order; of an embedding its weight's."""
        grids = self.grids | {name: grid for name, (_, _, grid) in self.embeddings.items()}
        quantized = {f"{module}.{part}" for module, grid in grids.items() for part in parts_of(grid)}
        weights = {f"{module}.codes": f"{module}{WEIGHT}" for module in self.embeddings}
        return [weights.get(name, name) for name in self.names() if name in weights or name not in quantized]

    def _checked(self, module: str, value: object) -> tuple[int, int, NamedGrid]:
        where = f"{self.path}: {module}"
        entry = value if isinstance(value, dict) else {}
        bits, group = entry.get("bits"), entry.get("group_size")
        if bits not in BITS or type(bits) is not int or type(group) is not int or group <= 0:
            raise UnsafeInputError("module entry needs bits and group_size", where=where, why=str(value)[:200])
        grid = grid_named(entry.get("grid", AFFINE16.name), bits, group, where=where)
        entries = {part: super(CanonicalCheckpoint, self).entry(f"{module}.{part}") for part in parts_of(grid)}
        codes, scale = entries["codes"], entries["scale"]
        numbers = [entries[part] for part in ("scale", "offset") if part in entries]
        steps = [entries[part] for part in STEPS if part in entries]
        if len(codes.shape) != 2 or len(scale.shape) != 2 or {each.shape for each in numbers} != {scale.shape}:
            raise UnsafeInputError("codes, scale or offset has the wrong rank or shape", where=where)
        expected = (scale.shape[0], packed_width(scale.shape[1] * group, bits))
        half = np.dtype("<f2")
        level = np.dtype(np.int8 if isinstance(grid, SymmetricGrid) else np.uint8)
        wanted: np.dtype[Any] = level if isinstance(grid, SuperBlockGrid) else half
        if codes.shape != expected or codes.dtype != np.uint8 or {each.dtype for each in numbers} != {wanted}:
            raise UnsafeInputError(f"codes are {codes.dtype}{codes.shape}, expected uint8{expected}", where=where)
        if isinstance(grid, SuperBlockGrid):
            per_row = (scale.shape[0], scale.shape[1] // grid.groups)
            if scale.shape[1] % grid.groups or {(step.shape, step.dtype) for step in steps} != {(per_row, half)}:
                raise UnsafeInputError(f"steps of super-blocks are not float16{per_row}", where=where)
        return bits, group, grid
