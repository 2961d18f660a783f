"""What differs between a checkpoint and a GGUF file made from it: the count that must be zero."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.model_folder import as_float32
from qalora_export.console import track
from qalora_export.formats.gguf.plan import DERIVED
from qalora_export.formats.gguf.readback import GgufContents
from qalora_export.grid import Differences, GroupAffine, difference, differing


@dataclass(frozen=True, slots=True)
class Comparison:
    """compared: how many values were looked at; quantized, plain: what differs, by name; a clean file has none."""

    compared: int
    quantized: dict[str, Differences] = field(default_factory=dict)
    plain: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(found.total for found in self.quantized.values()) + sum(self.plain.values())

    def describe(self) -> str:
        """The first few tensors that differ, with counts."""
        lines = [f"{name}: codes {d.codes}, scale {d.scale}, offset {d.offset}" for name, d in self.quantized.items()]
        lines += [f"{name}: {count} values" for name, count in self.plain.items()]
        return "; ".join(lines[:5]) + ("; …" if len(lines) > 5 else "")


def compare(checkpoint: CanonicalCheckpoint, contents: GgufContents, *, quiet: bool = False) -> Comparison:
    """Count differing codes, scales, offsets and other values, tensor by tensor.

    A missing, surplus or differently stored tensor counts with all its values.
    """
    compared, quantized, plain = 0, dict[str, Differences](), dict[str, int]()
    names = list(checkpoint.modules)
    for module in names if quiet else track(names, "read back"):
        matrix = checkpoint.group_affine(module)
        compared += matrix.codes.size + 2 * matrix.scale.size
        found = Differences(matrix.codes.size, matrix.scale.size, matrix.offset.size)
        if module in contents.modules:
            found = _difference(matrix, contents.group_affine(module), module in contents.offset_is_implied)
        if found.total:
            quantized[module] = found
    expected = _carried(checkpoint)
    for name in expected:
        tensor = checkpoint.tensor(name)
        compared += tensor.size
        count = plain_differing(tensor, contents.tensor(name)) if name in contents.others else tensor.size
        if count:
            plain[name] = count
    known = {*expected, *(f"{module}.weight" for module in checkpoint.modules)}
    plain |= {name: 1 for name in contents.types if name not in known}
    return Comparison(compared, quantized, plain)


def _carried(checkpoint: CanonicalCheckpoint) -> list[str]:
    """Plain tensors that GGUF carries: all but derived buffers and a tied lm_head."""
    tied = bool(checkpoint.config.get("tie_word_embeddings"))
    names = [name for name in checkpoint.plain_names() if not name.endswith(DERIVED)]
    return [name for name in names if not (tied and name == "lm_head.weight")]


def plain_differing(source: NDArray, found: NDArray) -> int:
    """Differing values of a plain tensor; vectors are F32 in GGUF, so the source is widened (exactly) first."""
    if source.ndim == 1 and found.dtype == np.float32:
        return differing(as_float32(source), found)
    return differing(np.asarray(source), found)


def _difference(left: GroupAffine, right: GroupAffine, offset_is_implied: bool) -> Differences:
    if not offset_is_implied:
        return difference(left, right)
    zero = np.float16(0.0)  # x + 0 turns −0 into +0 and leaves every other value alone
    return Differences(
        differing(left.codes, right.codes), differing(left.scale, right.scale),
        differing(left.offset + zero, right.offset + zero),
    )  # fmt: skip
