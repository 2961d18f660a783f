"""Any Transformers model folder as a stream of tensors: one file or indexed shards, every name exactly once."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.safetensors_file import TensorEntry, map_tensor, read_header
from qalora_export.checkpoint.weight_files import INDEX, INDEX_SUFFIX, SINGLE, main_file
from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.safety import inside, read_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
# What makes the model usable and goes along unchanged through every stage.
COMPANIONS = (*TOKENIZER_FILES, "generation_config.json")
CONTEXT = "max_position_embeddings"


class ModelFolder:
    """Read-only view of a model folder. Opening checks every header; tensors are mapped on demand.

    Raises InputError for missing files and UnsafeInputError for lying headers, escaping paths or duplicate names.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise InputError("model folder not found", where=self.path, fix="give the folder that holds config.json")
        self.config: dict[str, Any] = read_json(inside(self.path, "config.json"))
        if not isinstance(self.config, dict):
            raise UnsafeInputError("config.json is not a JSON object", where=self.path)
        self._where: dict[str, tuple[Path, TensorEntry]] = {}
        for shard in _shards(self.path):
            for name, entry in read_header(shard).items():
                if name in self._where:
                    raise UnsafeInputError("two shards hold the same tensor", where=f"{shard}: {name}")
                self._where[name] = (shard, entry)

    @property
    def context(self) -> int | None:
        """Positions that the model has; None where config.json does not say. Raises InputError for no such number."""
        value = self.config.get(CONTEXT)
        if value is not None and (type(value) is not int or value <= 0):
            where = f"{self.path / 'config.json'}: {CONTEXT}"
            raise InputError(f"{CONTEXT} is {value!r}, not a positive number", where=where)
        return value

    def names(self) -> list[str]:
        """Tensor names in file order."""
        return list(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def entry(self, name: str) -> TensorEntry:
        return self._find(name)[1]

    def located(self, name: str) -> tuple[Path, TensorEntry]:
        """The file of a tensor, and where it lies there."""
        return self._find(name)

    def tensor(self, name: str) -> NDArray[Any]:
        """The tensor, memory-mapped, in its stored dtype (bfloat16 through ml_dtypes)."""
        return map_tensor(*self._find(name))

    def rows(self, name: str, rows: slice | NDArray[np.intp] = slice(None)) -> NDArray[Any]:
        """Some rows of a tensor; all of a scalar."""
        tensor = self.tensor(name)
        return np.asarray(tensor[rows] if tensor.ndim else tensor)

    def tensors(self) -> Iterator[tuple[str, NDArray[Any]]]:
        for name in self._where:
            yield name, self.tensor(name)

    def companions(self) -> list[Path]:
        """Tokenizer, chat template and generation files that exist."""
        return [inside(self.path, name) for name in COMPANIONS if os.path.lexists(self.path / name)]

    def _find(self, name: str) -> tuple[Path, TensorEntry]:
        if name not in self._where:
            raise InputError(f"the model has no tensor {name!r}", where=self.path, fix="is the download complete?")
        return self._where[name]


def _shards(folder: Path) -> list[Path]:
    name = main_file(folder)
    if name is None:
        hint = "convert pickled weights to safetensors first" if list(folder.glob("*.bin")) else "check the path"
        raise InputError("no safetensors weights here", where=folder, why=f"looked for {SINGLE} and {INDEX}", fix=hint)
    if not name.endswith(INDEX_SUFFIX):
        return [inside(folder, name)]
    index = read_json(inside(folder, name))
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise UnsafeInputError("weight_map is not a table of names", where=folder / name)
    shards = [inside(folder, shard) for shard in sorted(set(weight_map.values()))]
    found = {tensor for shard in shards for tensor in read_header(shard)}
    if missing := sorted(set(weight_map) - found):
        raise InputError(f"the index names {len(missing)} tensors no shard holds", where=folder, why=missing[0])
    return shards


def as_float32(tensor: NDArray[Any]) -> NDArray[np.float32]:
    """Widen F16, BF16 or F32 to float32, exactly. Raises InputError for other dtypes."""
    if tensor.dtype.itemsize > 4 or tensor.dtype.kind in "iub?":
        raise InputError(f"expected a float tensor of at most 32 bits, found {tensor.dtype}")
    return np.asarray(tensor).astype(np.float32)
