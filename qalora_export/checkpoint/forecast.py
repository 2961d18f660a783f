"""What a base checkpoint holds or will hold: names, shapes, bits and groups, without a single weight.

Every stage after quantize can be checked against it before quantize has run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.checkpoint.safetensors_file import TensorEntry
from qalora_export.grid import AFFINE16, NamedGrid, SuperBlockGrid, SymmetricGrid, implied_offset, packed_width
from qalora_export.grid.named import SUPER_BLOCK

FP16 = 2  # bytes


@dataclass(frozen=True, slots=True)
class Forecast:
    """folder: where config.json, the tokenizer's files and the tensors that are not quantized are read from: the source
    of quantize, or the checkpoint itself. modules: name -> (bits, group size) of what is quantized; shapes: its
    (out, in). plain: every other tensor. symmetric: modules whose offset will be −2^(bits−1)·scale. codes: lowest and
    highest code of modules that cannot use all of theirs. kept: modules that the source holds in canonical form.
    grids: of modules that are not on the usual one. embeddings: bits, group size and grid of those that go into blocks;
    `plain` has them as readers see them, float32. calibration_tokens: that quantize will read.
    """

    folder: ModelFolder
    modules: Mapping[str, tuple[int, int]]
    shapes: Mapping[str, tuple[int, int]]
    plain: Mapping[str, TensorEntry]
    symmetric: frozenset[str] = frozenset()
    codes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    kept: frozenset[str] = frozenset()
    grids: Mapping[str, NamedGrid] = field(default_factory=dict)
    embeddings: Mapping[str, tuple[int, int, NamedGrid]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    calibration_tokens: int = 0

    @classmethod
    def of(cls, checkpoint: CanonicalCheckpoint) -> Forecast:
        """Of a checkpoint that is there. Of its values only scales and offsets of 8-bit modules are read, so that
        `symmetric` names those and no others; `codes` stays empty.
        """
        shapes = {}
        for name, (_, group) in checkpoint.modules.items():
            rows, groups = checkpoint.entry(f"{name}.scale").shape
            shapes[name] = (rows, groups * group)
        plain = {name: checkpoint.entry(name) for name in checkpoint.plain_names()}
        return cls(
            checkpoint,
            checkpoint.modules,
            shapes,
            plain,
            symmetric=frozenset(name for name in checkpoint.modules if holds_symmetric(checkpoint, name)),
            grids=checkpoint.grids,
            embeddings=checkpoint.embeddings,
        )

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
            numbers //= 2 if grid.symmetric else 1  # of the scale alone
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
        size = self.packed_bytes + self.plain_bytes
        for name, (bits, group, grid) in self.embeddings.items():
            entry = self.plain[f"{name}.weight"]
            size += int(math.prod(entry.shape) * grid.bits_per_weight(bits, group) / 8) - entry.nbytes
        return size

    @property
    def bits_per_weight(self) -> float:
        """Average over what is quantized, embeddings in blocks included, with scales and offsets."""
        sizes = [
            (math.prod(self.shapes[name]), self.grid(name).bits_per_weight(bits, group))
            for name, (bits, group) in self.modules.items()
        ]
        for name, (bits, group, grid) in self.embeddings.items():
            sizes.append((math.prod(self.plain[f"{name}.weight"].shape), grid.bits_per_weight(bits, group)))
        return sum(count * bits for count, bits in sizes) / sum(count for count, _ in sizes)

    def mix(self) -> str:
        """One line of a plan: how many matrices are of which kind, and bits per weight."""
        kinds: dict[str, int] = {}
        for name, (bits, group) in self.modules.items():
            grid = self.grid(name)
            shown = f"{bits} bits g {group}{' sym' if name in self.symmetric else ''}"
            kind = shown if grid is AFFINE16 else grid.name
            kinds[kind] = kinds.get(kind, 0) + 1
        listed = [f"{count} × {kind}" for kind, count in kinds.items()]
        listed += [
            f"{name.rpartition('.')[2]} {f'{bits} bits g {group}' if grid is AFFINE16 else grid.name}"
            for name, (bits, group, grid) in self.embeddings.items()
        ]
        return f"{', '.join(listed)}: {self.bits_per_weight:.2f} bits per weight"

    @property
    def untrained(self) -> tuple[str, ...]:
        """Modules that training leaves alone unless a target names them: 8 bits that are symmetric, which no GGUF file
        holds once an adapter moved their offsets, and grids without an offset of their own.
        """
        return tuple(name for name, (bits, _) in self.modules.items() if stays(self.grid(name), bits, self._sym(name)))

    def _sym(self, name: str) -> bool:
        return name in self.symmetric

    @property
    def quantized_values(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def parameters(self) -> int:
        return self.plain_values + self.quantized_values


def stays(grid: NamedGrid, bits: int, symmetric: bool) -> bool:
    """Whether training leaves a module alone."""
    return isinstance(grid, SymmetricGrid) or (grid is AFFINE16 and bits == 8 and symmetric)


def holds_symmetric(checkpoint: CanonicalCheckpoint, name: str) -> bool:
    """Whether an 8-bit module of the free grid is symmetric; its codes are not read."""
    bits, _ = checkpoint.modules[name]
    if bits != 8 or checkpoint.grids[name] is not AFFINE16:
        return False
    scale, offset = (np.asarray(checkpoint.tensor(f"{name}.{part}")) for part in ("scale", "offset"))
    return bool(np.array_equal(offset, implied_offset(scale, 128)))
