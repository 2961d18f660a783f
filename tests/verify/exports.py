"""Artifacts to verify, copies to damage, and ways to damage them at a known place."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from gguf import GGUFReader

from qalora_export.formats.gguf.export import export_gguf
from qalora_export.formats.onnx.export import export_onnx
from qalora_export.formats.onnx.layout import DATA, GRAPH
from qalora_export.formats.onnx.read import read_back
from qalora_export.recipe import GgufSettings, OnnxSettings, VerifySettings
from qalora_export.verify.stage import verify_parity


@dataclass(frozen=True)
class Exported:
    checkpoint: Path
    gguf: Path
    onnx: Path


def verified(line: Path, report: Path, *, artifacts: Path | None = None) -> set[str]:
    """What verify-parity says, with every runtime, of `merged` over `base` in `line`: the statuses of all entries.

    artifacts: the folder with model.gguf and onnx, when it is not `line`.
    """
    artifacts = artifacts or line
    found = verify_parity(
        line / "merged",
        report,
        VerifySettings(threads=1),
        gguf=artifacts / "model.gguf",
        onnx=artifacts / "onnx",
        base=line / "base",
    )
    return {entry.status for entry in found.entries}


def export_both(checkpoint: Path, folder: Path) -> Exported:
    export_gguf(checkpoint, folder / "model.gguf", GgufSettings())
    export_onnx(checkpoint, folder / "onnx", OnnxSettings())
    return Exported(checkpoint, folder / "model.gguf", folder / "onnx")


def copy_of(exported: Exported, folder: Path) -> Exported:
    shutil.copyfile(exported.gguf, folder / exported.gguf.name)
    sidecar = f"{exported.gguf.name}.manifest.json"
    shutil.copyfile(exported.gguf.with_name(sidecar), folder / sidecar)
    shutil.copytree(exported.onnx, folder / "onnx")
    return Exported(exported.checkpoint, folder / exported.gguf.name, folder / "onnx")


def patch(path: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes in place; the data must really change, or the test would plant nothing."""
    with path.open("r+b") as file:
        file.seek(offset)
        assert file.read(len(data)) != data
        file.seek(offset)
        file.write(data)


def gguf_block(path: Path, tensor: str) -> int:
    """File offset of the first block of a tensor. Q4_1: float16 d, float16 m, 16 bytes of codes."""
    return next(int(t.data_offset) for t in GGUFReader(path).tensors if t.name == tensor)


def read_at(path: Path, offset: int, count: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(count)


def gguf_value(path: Path, key: str) -> int:
    """File offset of the value of a scalar metadata entry: key length, key, u32 type, value."""
    raw = path.read_bytes()
    marker = len(key).to_bytes(8, "little") + key.encode()
    assert raw.count(marker) == 1
    return raw.index(marker) + len(marker) + 4


def onnx_tensor(folder: Path, name: str) -> int:
    """File offset of a tensor in onnx/model.onnx_data."""
    stored = {entry.key: entry.value for entry in read_back(folder).initializers[name].external_data}
    return int(stored["offset"])


def float32(value: float) -> bytes:
    return np.float32(value).tobytes()


def flatten(folder: Path) -> None:
    """Turn an ONNX folder into one as earlier versions wrote it: graph and data at the top, nothing for browsers."""
    model = onnx.load(folder / GRAPH, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "model.onnx.data"
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (folder / DATA).rename(folder / "model.onnx.data")
    shutil.rmtree(folder / "onnx")
    for name in ("config.json", "generation_config.json", "manifest.json"):
        (folder / name).unlink()
    config = (folder / "genai_config.json").read_text()
    (folder / "genai_config.json").write_text(config.replace(GRAPH, "model.onnx"))
