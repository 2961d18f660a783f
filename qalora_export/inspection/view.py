"""Any artifact for `inspect`: what it is, what it holds (formats.contents), what it says, where it came from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import QUANT_METHOD, CanonicalCheckpoint
from qalora_export.checkpoint.manifest import has_manifest, manifest_at, read_manifest
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.checkpoint.safetensors_file import map_tensor, read_header
from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.formats.contents import Contents, FolderContents
from qalora_export.formats.onnx.layout import is_onnx_folder
from qalora_export.grid import AFFINE16, NamedGrid, PackedAffine
from qalora_export.safety import StrPath, read_json


@dataclass(frozen=True)
class View:
    """kind: what it is. contents: its tensors. facts: what it says about itself. manifest: its provenance, if any."""

    kind: str
    path: Path
    contents: Contents
    facts: dict[str, str] = field(default_factory=dict)
    manifest: dict[str, Any] | None = None

    @property
    def bytes_on_disk(self) -> int:
        files = [self.path] if self.path.is_file() else [p for p in self.path.rglob("*") if p.is_file()]
        return sum(file.stat().st_size for file in files)


def open_view(path: StrPath) -> View:
    """Open any artifact: a checkpoint, an adapter, a GGUF file, an ONNX folder or a plain model folder; read-only.

    Tensors are read when they are asked for. Raises InputError for what is none of ours, UnsafeInputError for files
    that lie.
    """
    path = Path(path)
    if path.suffix == ".gguf" and not path.is_dir():
        return _gguf(path)
    if not path.is_dir():
        raise InputError(
            "nothing to inspect here", where=path, fix="give a model folder, an ONNX folder or a .gguf file"
        )
    if is_onnx_folder(path):
        return _onnx(path)
    if (path / "adapter_model.safetensors").is_file():
        return _adapter(path)
    return _folder(path)


def _gguf(path: Path) -> View:
    from qalora_export.checkpoint.manifest import sidecar_path
    from qalora_export.formats.gguf.read import read_back

    contents = read_back(path)
    facts = {key: _short(value) for key, value in contents.metadata.items() if not key.startswith("qalora.modules")}
    sidecar = sidecar_path(path)
    return View("GGUF", path, contents, facts, manifest_at(sidecar) if os.path.lexists(sidecar) else None)


def _onnx(path: Path) -> View:
    from qalora_export.formats.onnx.read import read_back

    contents = read_back(path)
    facts = {key: _short(value) for key, value in contents.metadata.items() if key != "qalora.modules"}
    facts["accuracy_level"] = str(contents.accuracy_level)
    return View("ONNX folder", path, contents, facts, _manifest(path))


class AdapterContents:
    """adapter_model.safetensors as Contents: tensors, none of them quantized."""

    def __init__(self, file: Path) -> None:
        self._file, self._entries = file, read_header(file)
        self.modules: Mapping[str, tuple[int, int]] = {}
        self.grids: Mapping[str, NamedGrid] = {}
        self.others = list(self._entries)
        self.opaque: Mapping[str, str] = {}
        self.offset_is_implied = self.optional = frozenset[str]()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def stored(self, name: str) -> tuple[str, int]:
        return self._entries[name].dtype.name, self._entries[name].nbytes

    def packed(self, module: str, rows: slice = slice(None)) -> PackedAffine:
        raise InputError("an adapter holds no quantized matrices", where=f"{self._file}: {module}")

    def tensor(self, name: str, rows: slice = slice(None)) -> NDArray[Any]:
        tensor = map_tensor(self._file, self._entries[name])
        return np.asarray(tensor[rows] if tensor.ndim else tensor)

    def carried(self, name: str, tensor: NDArray[Any]) -> NDArray[Any]:
        return tensor


def _adapter(path: Path) -> View:
    config = read_json(path / "adapter_config.json")
    if not isinstance(config, dict):
        raise UnsafeInputError("adapter_config.json is not a JSON object", where=path)
    facts = {key: _short(value) for key, value in config.items()}
    return View("adapter", path, AdapterContents(path / "adapter_model.safetensors"), facts, _manifest(path))


def _folder(path: Path) -> View:
    folder = ModelFolder(path)
    quantization = folder.config.get("quantization_config")
    facts = {key: _short(value) for key, value in folder.config.items() if key != "quantization_config"}
    if isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD:
        canonical = FolderContents(CanonicalCheckpoint(path))
        return View("canonical checkpoint", path, canonical, facts, _manifest(path))
    return View("model folder", path, FolderContents(folder), facts, _manifest(path))


def _manifest(path: Path) -> dict[str, Any] | None:
    return read_manifest(path) if has_manifest(path) else None


def _short(value: object, limit: int = 80) -> str:
    if isinstance(value, list) and len(value) > 16:
        return f"[{len(value)} entries]"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def byte_table(view: View) -> dict[str, tuple[int, int, int]]:
    """kind of tensor -> (count, parameters, bytes): quantized by bits and group size, the others by type.

    Bytes of a quantized matrix are those of its information: packed codes, scale and offset as its grid has them.
    """
    table: dict[str, tuple[int, int, int]] = {}

    def add(kind: str, shape: tuple[int, ...], size: int) -> None:
        count, parameters, total = table.get(kind, (0, 0, 0))
        table[kind] = (count + 1, parameters + math.prod(shape), total + size)

    contents = view.contents
    for module, (bits, group) in contents.modules.items():
        out, columns = contents.shape(module)
        grid = contents.grids.get(module, AFFINE16)
        name = "" if grid is AFFINE16 else f", {grid.name}"
        size = int(out * columns * grid.bits_per_weight(bits, group) / 8)
        add(f"{bits} bit, g {group}{name}", (out, columns), size)
    for name in (*contents.others, *contents.opaque):
        kind, size = contents.stored(name)
        add(kind, contents.shape(name), size)
    return table
