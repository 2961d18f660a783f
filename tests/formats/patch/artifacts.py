"""Merges of one base whose offsets were moved at random, and what they become."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.canonical_writer import CanonicalWriter
from qalora_export.checkpoint.manifest import parent_of
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.grid import GroupAffine


def moved(base: Path, out: Path, seed: int, *, size: float = 0.02, codes: int = 0) -> Path:
    """A copy of a checkpoint with other offsets; codes: how many codes of one matrix are changed as well."""
    checkpoint, folder, random = CanonicalCheckpoint(base), ModelFolder(base), np.random.default_rng(seed)
    with CanonicalWriter(
        out, folder.config, folder.companions(), kind="merged", parents=[parent_of(base, "base")]
    ) as writer:
        for module in checkpoint.modules:
            matrix = checkpoint.packed(module).unpack()
            offset = (matrix.offset + random.normal(0, size, matrix.offset.shape)).astype(np.float16)
            other = matrix.codes.copy()
            other[0, :codes] ^= 1
            writer.add_quantized(module, GroupAffine(other, matrix.scale, offset, matrix.bits))
            codes = 0
        for name in checkpoint.plain_names():
            writer.add(name, checkpoint.tensor(name))
    return out
