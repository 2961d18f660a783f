"""Writer of canonical checkpoints; what it writes is described in canonical.py."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import TensorSpec, serialize_file

from qalora_export.checkpoint.canonical import QUANT_METHOD, VERSION, WEIGHT, CanonicalCheckpoint, parts_of
from qalora_export.checkpoint.manifest import FileKind, Parent, write_manifest
from qalora_export.checkpoint.weight_files import INDEX, SINGLE
from qalora_export.errors import InputError
from qalora_export.grid import GroupAffine, pack_codes
from qalora_export.safety import atomic_directory, sha256_bytes


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
        self._embeddings: dict[str, dict[str, Any]] = {}

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
        self._modules[module] = self._add_matrix(module, matrix)

    def add_embedding(self, module: str, matrix: GroupAffine) -> None:
        """The same for an embedding, which stays a plain tensor to readers."""
        self._embeddings[module] = self._add_matrix(module, matrix)

    def add_rest_of(self, checkpoint: CanonicalCheckpoint) -> None:
        """Everything of a checkpoint but its quantized modules, as it is stored there."""
        for name in checkpoint.plain_names():
            if (embedding := name.removesuffix(WEIGHT)) in checkpoint.embeddings:
                self.add_embedding(embedding, checkpoint.packed(embedding).unpack())
            else:
                self.add(name, checkpoint.tensor(name))

    def _add_matrix(self, module: str, matrix: GroupAffine) -> dict[str, Any]:
        levels = matrix.levels
        if levels is None and matrix.scale.dtype != np.float16:
            raise InputError("scales and offsets are products whose levels are not known", where=module)
        self.add(f"{module}.codes", pack_codes(matrix.codes, matrix.bits))
        for part in parts_of(matrix.grid)[1:]:
            self.add(f"{module}.{part}", getattr(matrix if levels is None else levels, part))
        grid = {} if levels is None else {"grid": levels.grid.name}
        return {"bits": matrix.bits, "group_size": matrix.group_size} | grid

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
        quantization |= {"embeddings": self._embeddings} if self._embeddings else {}
        _dump(self._folder / "config.json", self._config | {"quantization_config": quantization})
        for path in self._companions:
            shutil.copyfile(path, self._folder / path.name)
        write_manifest(self._folder, self._kind, tensors=self._hashes, parents=self._parents, settings=self._settings)


def _dump(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=False) + "\n", encoding="utf-8")
