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

Everything else is stored under its own name in its source dtype, bit for bit.
"""

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import TensorSpec, serialize_file

from qalora_export.checkpoint.manifest import FileKind, Parent, write_manifest
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.checkpoint.weight_files import INDEX, SINGLE
from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.grid import (
    AFFINE16,
    BITS,
    GroupAffine,
    Levels,
    NamedGrid,
    PackedAffine,
    SuperBlockGrid,
    grid_named,
    pack_codes,
    packed_width,
)
from qalora_export.safety import atomic_directory, sha256_bytes

QUANT_METHOD = "qalora"
VERSION = 1
PARTS = ("codes", "scale", "offset")
STEPS = ("scale_step", "offset_step")


def parts_of(grid: NamedGrid) -> tuple[str, ...]:
    """Last names of the tensors of a matrix on that grid."""
    return PARTS + STEPS if isinstance(grid, SuperBlockGrid) else PARTS


def is_canonical(folder: Path) -> bool:
    """Whether a model folder's config.json says that it is a canonical checkpoint. Errors as of ModelFolder."""
    raw = ModelFolder(folder).config.get("quantization_config")
    return isinstance(raw, dict) and raw.get("quant_method") == QUANT_METHOD


class CanonicalCheckpoint(ModelFolder):
    """A canonical checkpoint, opened for streaming. `modules` maps module name to (bits, group_size), `grids` to the
    grid of its scales and offsets.
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

    def group_affine(self, module: str) -> GroupAffine:
        """The quantized matrix of one module, unpacked in memory."""
        with self._located(module):
            return self.packed(module).unpack()

    def packed(self, module: str, rows: slice | NDArray[np.intp] = slice(None)) -> PackedAffine:
        """Some rows of a module's matrix, codes still packed; only the pages of those rows are read."""
        (bits, group_size), grid = self.modules[module], self.grids[module]
        codes, scale, offset, *steps = (np.asarray(self.tensor(f"{module}.{part}")[rows]) for part in parts_of(grid))
        with self._located(module):
            if isinstance(grid, SuperBlockGrid):
                return PackedAffine.on_levels(codes, Levels(grid, scale, offset, *steps))
            return PackedAffine(codes, scale, offset, bits, group_size)

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
        """Names of the tensors that are not part of a quantized module, in file order."""
        quantized = {f"{module}.{part}" for module, grid in self.grids.items() for part in parts_of(grid)}
        return [name for name in self.names() if name not in quantized]

    def _checked(self, module: str, value: object) -> tuple[int, int, NamedGrid]:
        where = f"{self.path}: {module}"
        entry = value if isinstance(value, dict) else {}
        bits, group = entry.get("bits"), entry.get("group_size")
        if bits not in BITS or type(bits) is not int or type(group) is not int or group <= 0:
            raise UnsafeInputError("module entry needs bits and group_size", where=where, why=str(value)[:200])
        grid = grid_named(entry.get("grid", AFFINE16.name), bits, group, where=where)
        codes, scale, offset, *steps = (self.entry(f"{module}.{part}") for part in parts_of(grid))
        if len(codes.shape) != 2 or len(scale.shape) != 2 or scale.shape != offset.shape:
            raise UnsafeInputError("codes, scale or offset has the wrong rank or shape", where=where)
        expected = (scale.shape[0], packed_width(scale.shape[1] * group, bits))
        half, byte = np.dtype("<f2"), np.dtype(np.uint8)
        wanted = {byte} if isinstance(grid, SuperBlockGrid) else {half}
        if codes.shape != expected or codes.dtype != np.uint8 or {scale.dtype, offset.dtype} != wanted:
            raise UnsafeInputError(f"codes are {codes.dtype}{codes.shape}, expected uint8{expected}", where=where)
        if isinstance(grid, SuperBlockGrid):
            per_row = (scale.shape[0], scale.shape[1] // grid.groups)
            if scale.shape[1] % grid.groups or {(step.shape, step.dtype) for step in steps} != {(per_row, half)}:
                raise UnsafeInputError(f"steps of super-blocks are not float16{per_row}", where=where)
        return bits, group, grid


class CanonicalWriter:
    """Streams a canonical checkpoint into place: shards of at most `shard_bytes`, manifest last, then one rename.

    Use as a context manager; nothing appears under `target` unless the block ends without an exception.
    """

    def __init__(
        self,
        target: Path,
        config: dict[str, Any],
        companions: Iterable[Path] = (),
        *,
        kind: FileKind,
        parents: list[Parent] | None = None,
        settings: dict[str, Any] | None = None,
        force: bool = False,
        shard_bytes: int = 512 * 2**20,
    ) -> None:
        self._atomic = atomic_directory(target, force=force)
        self._config, self._companions = config, list(companions)
        self._kind, self._parents, self._settings = kind, parents or [], settings or {}
        self._shard_bytes, self._pending, self._pending_bytes = shard_bytes, dict[str, NDArray[Any]](), 0
        self._shard_names: list[list[str]] = []
        self._hashes: dict[str, dict[str, Any]] = {}
        self._modules: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> "CanonicalWriter":
        self._folder = self._atomic.__enter__()
        return self

    def add(self, name: str, tensor: NDArray[Any]) -> None:
        """Store a tensor that is not quantized, bit for bit."""
        if name in self._hashes:
            raise InputError("tensor written twice", where=name)
        tensor = np.asarray(tensor, order="C")  # unlike ascontiguousarray it keeps a scalar a scalar
        digest = sha256_bytes(tensor)
        self._hashes[name] = {"dtype": tensor.dtype.name, "shape": list(tensor.shape), "sha256": digest}
        if self._pending and self._pending_bytes + tensor.nbytes > self._shard_bytes:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes

    def add_quantized(self, module: str, matrix: GroupAffine) -> None:
        """Store a quantized matrix as codes, scale and offset. Raises InputError for products of unknown levels."""
        if matrix.levels is None and matrix.scale.dtype != np.float16:
            raise InputError("scales and offsets are products whose levels are not known", where=module)
        self._modules[module] = {"bits": matrix.bits, "group_size": matrix.group_size}
        self.add(f"{module}.codes", pack_codes(matrix.codes, matrix.bits))
        levels = matrix.levels
        if levels is not None:
            self._modules[module]["grid"] = levels.grid.name
        for part in parts_of(matrix.grid)[1:]:
            self.add(f"{module}.{part}", getattr(matrix if levels is None else levels, part))

    def add_json(self, name: str, value: object) -> None:
        """One more file of the folder, named in its manifest; no file that carries the model."""
        _dump(self._folder / name, value)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            try:
                self._finish()
            except BaseException as failure:
                if not self._atomic.__exit__(type(failure), failure, failure.__traceback__):
                    raise
                return
        self._atomic.__exit__(kind, error, trace)

    def _flush(self) -> None:
        path = self._folder / f"shard-{len(self._shard_names)}.safetensors"
        specs = {
            name: TensorSpec(dtype=t.dtype.name, shape=t.shape, data_ptr=t.ctypes.data, data_len=t.nbytes)
            for name, t in self._pending.items()
        }
        serialize_file(specs, path, metadata={"format": "pt"})
        self._shard_names.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _finish(self) -> None:
        self._flush()
        count = len(self._shard_names)
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._shard_names):
            final = SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            (self._folder / f"shard-{index}.safetensors").rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            _dump(self._folder / INDEX, {"metadata": {}, "weight_map": weight_map})
        quantization = {"quant_method": QUANT_METHOD, "version": VERSION, "modules": self._modules}
        _dump(self._folder / "config.json", self._config | {"quantization_config": quantization})
        for path in self._companions:
            shutil.copyfile(path, self._folder / path.name)
        write_manifest(self._folder, self._kind, tensors=self._hashes, parents=self._parents, settings=self._settings)


def _dump(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=False) + "\n", encoding="utf-8")
