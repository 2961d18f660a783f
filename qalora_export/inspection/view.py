"""One vocabulary for every artifact: quantized modules, other tensors, facts, provenance.

A canonical checkpoint, a GGUF file, an ONNX folder, an adapter and a plain model folder all answer the same
questions, so that any two can be compared value by value.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.manifest import MANIFEST, manifest_at, read_manifest
from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.grid import GroupAffine
from qalora_export.safety import StrPath, read_json


@dataclass(frozen=True)
class View:
    """kind: what it is. modules: module -> (bits, group_size). others: names of tensors that are not quantized.

    group_affine and tensor load one matrix or tensor by name. facts: what the file says about itself. manifest: the
    provenance record, or None when there is none.
    """

    kind: str
    path: Path
    modules: dict[str, tuple[int, int]]
    others: list[str]
    group_affine: Callable[[str], GroupAffine]
    tensor: Callable[[str], NDArray[Any]]
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
    if path.is_file() and path.suffix == ".gguf":
        return _gguf(path)
    if not path.is_dir():
        raise InputError(
            "nothing to inspect here", where=path, fix="give a model folder, an ONNX folder or a .gguf file"
        )
    if (path / "model.onnx").is_file():
        return _onnx(path)
    if (path / "adapter_model.safetensors").is_file():
        return _adapter(path)
    return _folder(path)


def _gguf(path: Path) -> View:
    from qalora_export.checkpoint.sidecar import sidecar_path
    from qalora_export.formats.gguf.read import read_back

    contents = read_back(path)
    facts = {key: _short(value) for key, value in contents.metadata.items() if not key.startswith("qalora.modules")}
    sidecar = sidecar_path(path)
    manifest = manifest_at(sidecar) if sidecar.is_file() else None
    return View(
        "GGUF", path, contents.modules, contents.others, contents.group_affine, contents.tensor, facts, manifest
    )


def _onnx(path: Path) -> View:
    from qalora_export.formats.onnx.read import read_back

    contents = read_back(path)
    facts = {key: _short(value) for key, value in contents.metadata.items() if key != "qalora.modules"}
    facts["accuracy_level"] = str(contents.accuracy_level)
    return View(
        "ONNX folder",
        path,
        contents.modules,
        contents.others,
        contents.group_affine,
        contents.tensor,
        facts,
        _manifest(path),
    )


def _adapter(path: Path) -> View:
    from qalora_export.checkpoint.safetensors_file import map_tensor, read_header

    file = path / "adapter_model.safetensors"
    entries = read_header(file)
    config = read_json(path / "adapter_config.json")
    if not isinstance(config, dict):
        raise UnsafeInputError("adapter_config.json is not a JSON object", where=path)
    facts = {key: _short(value) for key, value in config.items()}
    return View(
        "adapter",
        path,
        {},
        list(entries),
        _no_matrices,
        lambda name: map_tensor(file, entries[name]),
        facts,
        _manifest(path),
    )


def _folder(path: Path) -> View:
    from qalora_export.checkpoint.canonical import QUANT_METHOD, CanonicalCheckpoint
    from qalora_export.checkpoint.model_folder import ModelFolder

    plain = ModelFolder(path)
    quantization = plain.config.get("quantization_config")
    facts = {key: _short(value) for key, value in plain.config.items() if key != "quantization_config"}
    if isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD:
        canonical = CanonicalCheckpoint(path)
        return View(
            "canonical checkpoint",
            path,
            canonical.modules,
            canonical.plain_names(),
            canonical.group_affine,
            canonical.tensor,
            facts,
            _manifest(path),
        )
    return View("model folder", path, {}, plain.names(), _no_matrices, plain.tensor, facts, _manifest(path))


def _manifest(path: Path) -> dict[str, Any] | None:
    return read_manifest(path) if (path / MANIFEST).is_file() else None


def _no_matrices(module: str) -> GroupAffine:
    raise InputError("this artifact holds no quantized matrices", where=module)


def _short(value: object, limit: int = 80) -> str:
    if isinstance(value, list) and len(value) > 16:
        return f"[{len(value)} entries]"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def byte_table(view: View) -> dict[str, tuple[int, int, int]]:
    """kind of tensor -> (count, parameters, bytes): quantized by bits and group size, the others by dtype.

    Bytes of a quantized matrix are those of its information: packed codes, fp16 scale, fp16 offset.
    """
    table: dict[str, list[int]] = {}
    for module, (bits, group) in view.modules.items():
        matrix = view.group_affine(module)
        size = matrix.codes.size * bits // 8 + matrix.scale.nbytes + matrix.offset.nbytes
        _add(table, f"{bits} bit, g {group}", matrix.codes.size, size)
    for name in view.others:
        tensor = view.tensor(name)
        _add(table, str(tensor.dtype), tensor.size, tensor.nbytes)
    return {kind: (row[0], row[1], row[2]) for kind, row in table.items()}


def _add(table: dict[str, list[int]], kind: str, parameters: int, size: int) -> None:
    row = table.setdefault(kind, [0, 0, 0])
    row[0], row[1], row[2] = row[0] + 1, row[1] + parameters, row[2] + size


def same_values(left: NDArray[Any], right: NDArray[Any]) -> int:
    """Count of values that differ as numbers, for tensors that may be stored in different float widths."""
    if left.shape != right.shape:
        return max(left.size, right.size)
    wide_l, wide_r = np.asarray(left).astype(np.float64), np.asarray(right).astype(np.float64)
    return int(np.count_nonzero((wide_l != wide_r) & ~(np.isnan(wide_l) & np.isnan(wide_r))))
