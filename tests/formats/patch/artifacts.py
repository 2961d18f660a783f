"""Merges of one base whose offsets were moved at random, what they become, and what of it is compared."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.canonical_writer import CanonicalWriter
from qalora_export.checkpoint.manifest import parent_of
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.formats.gguf.export import export_gguf
from qalora_export.formats.onnx.export import export_onnx
from qalora_export.grid import GroupAffine


def moved(base: Path, out: Path, seed: int, *, size: float = 0.02, codes: int = 0, scales: bool = False) -> Path:
    """A copy of a checkpoint with other offsets, and scales; codes: how many of one matrix are changed as well."""
    checkpoint, folder, random = CanonicalCheckpoint(base), ModelFolder(base), np.random.default_rng(seed)
    with CanonicalWriter(
        out, folder.config, folder.companions(), kind="merged", parents=[parent_of(base, "base")]
    ) as writer:
        for module in checkpoint.modules:
            matrix = checkpoint.packed(module).unpack()
            offset = (matrix.offset + random.normal(0, size, matrix.offset.shape)).astype(np.float16)
            other = matrix.codes.copy()
            other[0, :codes] ^= 1
            scale = matrix.scale
            if scales:
                scale = (scale * random.uniform(0.9, 1.1, scale.shape)).astype(np.float16)
            writer.add_quantized(module, GroupAffine(other, scale, offset, matrix.bits))
            codes = 0
        writer.add_rest_of(checkpoint)
    return out


KINDS = {"model.gguf": "gguf", "onnx": "onnx"}


def export_all(checkpoint: Path, folder: Path) -> None:
    folder.mkdir()
    export_gguf(checkpoint, folder / "model.gguf")
    export_onnx(checkpoint, folder / "onnx")


def copied(source: Path, folder: Path) -> Path:
    """A copy of an artifact, its manifest beside it included."""
    if source.is_dir():
        return Path(shutil.copytree(source, folder / source.name))
    shutil.copyfile(source.with_name("model.gguf.manifest.json"), folder / "model.gguf.manifest.json")
    return Path(shutil.copyfile(source, folder / source.name))


def content(artifact: Path) -> dict[str, bytes]:
    root = artifact if artifact.is_dir() else artifact.parent
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def expected(artifact: Path) -> dict[str, bytes]:
    """What `content` gives for a copy of it."""
    if artifact.is_dir():
        return content(artifact)
    return {name: (artifact.parent / name).read_bytes() for name in ("model.gguf", "model.gguf.manifest.json")}
