"""What a base checkpoint holds or will hold: names, shapes, bits and groups, without a single weight.

Every stage after quantize can be checked against it before quantize has run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.checkpoint.safetensors_file import TensorEntry
from qalora_export.grid import AFFINE16, NamedGrid, SuperBlockGrid, packed_width
from qalora_export.grid.named import SUPER_BLOCK

FP16 = 2  # bytes


@dataclass(frozen=True, slots=True)
class Forecast:
    """folder: where config.json, the tokenizer's files and the tensors that are not quantized are read from: the source
    of quantize, or the checkpoint itself. modules: name -> (bits, group size) of what is quantized; shapes: its
    (out, in). plain: every other tensor. symmetric: modules whose offset will be −2^(bits−1)·scale. codes: lowest and
    highest code of modules that cannot use all of theirs. kept: modules that the source holds in canonical form.
    grids: of modules that are not on the usual one. calibration_tokens: that quantize will read.
    """

    folder: ModelFolder
    modules: Mapping[str, tuple[int, int]]
    shapes: Mapping[str, tuple[int, int]]
    plain: Mapping[str, TensorEntry]
    symmetric: frozenset[str] = frozenset()
    codes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    kept: frozenset[str] = frozenset()
    grids: Mapping[str, NamedGrid] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    calibration_tokens: int = 0

    @classmethod
    def of(cls, checkpoint: CanonicalCheckpoint) -> Forecast:
        """Of a checkpoint that is there. Its values are not read: `symmetric` and `codes` stay empty."""
        shapes = {}
        for name, (_, group) in checkpoint.modules.items():
            rows, groups = checkpoint.entry(f"{name}.scale").shape
            shapes[name] = (rows, groups * group)
        plain = {name: checkpoint.entry(name) for name in checkpoint.plain_names()}
        return cls(checkpoint, checkpoint.modules, shapes, plain, grids=checkpoint.grids)

    def grid(self, module: str) -> NamedGrid:
        return self.grids.get(module, AFFINE16)

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def config(self) -> Mapping[str, Any]:
        return self.folder.config

    @property
    def context(self) -> int | None:
        return self.folder.context

    @property
    def packed_bytes(self) -> int:
        """Codes, scales and offsets."""
        return sum(self._bytes(name) for name in self.modules)

    def _bytes(self, name: str) -> int:
        (out, width), (bits, group), grid = self.shapes[name], self.modules[name], self.grid(name)
        numbers = 2 * FP16 * width // group
        if isinstance(grid, SuperBlockGrid):  # levels of a byte, and steps
            numbers = 2 * width // group + 2 * FP16 * width // SUPER_BLOCK
        return out * (packed_width(width, bits) + numbers)

    @property
    def plain_values(self) -> int:
        return sum(math.prod(entry.shape) for entry in self.plain.values())

    @property
    def plain_bytes(self) -> int:
        return sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in self.plain.values())

    @property
    def nbytes(self) -> int:
        """Of the checkpoint's tensors on disk."""
        return self.packed_bytes + self.plain_bytes

    @property
    def quantized_values(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def parameters(self) -> int:
        return self.plain_values + self.quantized_values
