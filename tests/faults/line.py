"""One small line, base → adapter → merged → GGUF and ONNX, and copies of its artifacts to damage."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np

from qalora_export.formats.gguf.export import export_gguf
from qalora_export.formats.onnx.export import export_onnx
from qalora_export.formats.onnx.split_form import nearest_zero
from qalora_export.grid import pack_codes, unpack_codes
from qalora_export.qalora import merge as merging
from qalora_export.qalora.adapter_files import Adapter
from qalora_export.recipe import GgufSettings, OnnxSettings
from qalora_export.safety import sha256_file
from tests.models import make_tiny_canonical, make_tiny_model
from tests.qalora.adapters import own_adapter
from tests.verify.exports import gguf_block, onnx_tensor, read_at

RANK, ALPHA, GROUP = 4, 8.0, 32
# The damaged matrix: down_proj of the second layer, 128 × 256.
MODULE, GGUF_NAME, ROWS, COLUMNS = "model.layers.1.mlp.down_proj", "blk.1.ffn_down.weight", 128, 256
BLOCK_BYTES = 20  # Q4_1: float16 d, float16 m, 32 codes of 4 bits


@dataclass(frozen=True)
class Line:
    """Folders side by side, as `run` leaves them, so that provenance finds base and adapter."""

    base: Path
    adapter: Path
    merged: Path
    gguf: Path
    onnx: Path

    def copied(self, folder: Path, kind: str) -> Line:
        """The same line with its artifact of one kind copied to `folder`."""
        if kind == "gguf":
            for path in (self.gguf, sidecar(self.gguf)):
                shutil.copyfile(path, folder / path.name)
            return replace(self, gguf=folder / self.gguf.name)
        shutil.copytree(self.onnx, folder / self.onnx.name)
        return replace(self, onnx=folder / self.onnx.name)


def line_in(folder: Path) -> Line:
    """Where make_line puts it."""
    names = ("base.qalora", "adapter", "merged.qalora", "model.gguf", "onnx")
    return Line(*(folder / name for name in names))


def make_line(folder: Path) -> Line:
    make_tiny_model(folder / "model")
    base = make_tiny_canonical(folder / "base.qalora", folder / "model")
    own_adapter(base, folder / "adapter", rank=RANK, alpha=ALPHA)
    merging.merge(base, folder / "adapter", folder / "merged.qalora", compare_logits=False)
    return exported(Line(base, folder / "adapter", folder / "merged.qalora", Path(), Path()), folder, "gguf", "onnx")


def exported(line: Line, folder: Path, *kinds: str) -> Line:
    """Export `line.merged` into `folder`."""
    if "gguf" in kinds:
        export_gguf(line.merged, folder / "model.gguf", GgufSettings())
        line = replace(line, gguf=folder / "model.gguf")
    if "onnx" in kinds:
        export_onnx(line.merged, folder / "onnx", OnnxSettings())
        line = replace(line, onnx=folder / "onnx")
    return line


def merged_wrongly(line: Line, folder: Path, kind: str, change: Callable[[Adapter], Adapter]) -> Line:
    """Base and adapter merged by a merge with a fault in how it reads the adapter, then exported; all hashes right."""
    for source in (line.base, line.adapter):
        shutil.copytree(source, folder / source.name)
    line = replace(line, base=folder / line.base.name, adapter=folder / line.adapter.name, merged=folder / "merged")
    right = merging.read_adapter
    with patch.object(merging, "read_adapter", lambda *a, **k: change(right(*a, **k))):
        merging.merge(line.base, line.adapter, line.merged, compare_logits=False)
    return exported(line, folder, kind)


def sidecar(gguf: Path) -> Path:
    return gguf.with_name(f"{gguf.name}.manifest.json")


def reseal(line: Line, kind: str, *, checkpoint: Path | None = None) -> None:
    """Make the manifest agree with the damaged files: what must be found is the damage, not a hash.

    checkpoint: let the manifest say that the artifact was made from it.
    """
    manifest = sidecar(line.gguf) if kind == "gguf" else line.onnx / "manifest.json"
    content = json.loads(manifest.read_text())
    for name, entry in content["files"].items():
        path = manifest.parent / name
        entry |= {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    if checkpoint is not None:
        content["parents"][0]["sha256"] = sha256_file(checkpoint / "manifest.json")
    manifest.write_text(json.dumps(content))


@dataclass
class Matrix:
    """The quantized matrix of one tensor as its format stores it, in file order: bytes of codes, scale, offset.

    codes uint8 (rows, groups, 16): 4-bit codes, packed as the format packs them; scale, offset float16 (rows, groups).
    """

    codes: np.ndarray
    scale: np.ndarray
    offset: np.ndarray


def edit_gguf(
    gguf: Path, change: Callable[[Matrix], None], *, tensor: str = GGUF_NAME, rows: int = ROWS, columns: int = COLUMNS
) -> None:
    groups, at = columns // GROUP, gguf_block(gguf, tensor)
    raw = np.frombuffer(read_at(gguf, at, rows * groups * BLOCK_BYTES), np.uint8).reshape(rows, groups, BLOCK_BYTES)
    halves = raw[..., :4].copy().view(np.float16)
    matrix = Matrix(raw[..., 4:].copy(), halves[..., 0].copy(), halves[..., 1].copy())
    change(matrix)
    head = np.stack([matrix.scale, matrix.offset], axis=-1).view(np.uint8)
    write_at(gguf, at, np.concatenate([head, matrix.codes], axis=-1).tobytes())


def edit_onnx(folder: Path, change: Callable[[Matrix], None], *, module: str = MODULE) -> None:
    """Codes, scale and offset changed as an exporter would write them that had those in hand (4 bits)."""
    data, shape = folder / "onnx/model.onnx_data", (ROWS, COLUMNS // GROUP)
    places = {part: onnx_tensor(folder, f"{module}.{part}") for part in ("codes", "scale", "zero_points", "remainder")}

    def part(name: str, dtype: type, *dims: int) -> np.ndarray:
        raw = read_at(data, places[name], math.prod(dims) * np.dtype(dtype).itemsize)
        return np.frombuffer(raw, dtype).reshape(dims).copy()

    codes, scale = part("codes", np.uint8, *shape, GROUP // 2), part("scale", np.float16, *shape)
    zero = unpack_codes(part("zero_points", np.uint8, ROWS, shape[1] // 2), 4)
    rest = part("remainder", np.float16, *shape).astype(np.float64)
    matrix = Matrix(codes, scale, (rest - zero * scale.astype(np.float64)).astype(np.float16))
    change(matrix)
    zero = nearest_zero(4, *(part.astype(np.float32) for part in (matrix.scale, np.nan_to_num(matrix.offset))))
    exact = matrix.offset.astype(np.float64) + zero * matrix.scale.astype(np.float64)
    rounded = exact.astype(np.float16) != exact
    zero[rounded], exact[rounded] = 0, matrix.offset[rounded]
    written = {
        "codes": matrix.codes,
        "scale": matrix.scale,
        "zero_points": pack_codes(zero, 4),
        "remainder": exact.astype(np.float16),
    }
    for name, array in written.items():
        write_at(data, places[name], np.ascontiguousarray(array).tobytes())


def write_at(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
