"""Layout "split": a Q4_0 base (codes, s) and a llama.cpp LoRA adapter that adds the exact remainder.

    w[o, i] = s·(q − z) + R[o, i//g]          R = m + z·s          y = Q4_0·x + lora_b · (lora_a · x)

z = 2^(b−1): codes of fewer than 4 bits lie in the middle of Q4_0's own, q + 8 − z, so what the kernel multiplies with
int8 activations is at most z·s instead of 8·s.

lora_a is the group indicator (in/g, in), so lora_a·x is the sum of each group of x; lora_b is R (out, in/g). Both are
F32: F16 would round activations. adapter.lora.alpha is 0, which llama.cpp reads as "do not scale by alpha/rank", so the
scale is exactly 1 for every module whatever its rank (src/llama-adapter.h, get_scale).
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.manifest import parent_of
from qalora_export.formats.gguf.block_type import SLAB_BYTES
from qalora_export.formats.gguf.metadata import Entry, architecture
from qalora_export.formats.gguf.names import NameMap
from qalora_export.formats.gguf.remainder import group_indicator, remainder
from qalora_export.formats.gguf.tensor_table import TensorPlan, gguf_order
from qalora_export.formats.gguf.types import F32, base_type
from qalora_export.formats.streaming import row_blocks
from qalora_export.models.families import Family, family_of
from qalora_export.version import __version__


def adapter_path(out: Path) -> Path:
    """model.gguf -> model.lora.gguf"""
    return out.with_name(f"{out.stem}.lora{out.suffix}")


def adapter_entries(model: CanonicalCheckpoint, *, name: str | None = None) -> list[Entry]:
    """Metadata of the adapter file: what llama.cpp checks, the sizes our reader needs, and provenance.

    name: what it calls itself; by default after the checkpoint's folder.
    """
    family = family_of(model.config)
    return [
        Entry("general.type", "string", "adapter"),
        Entry("general.name", "string", f"{model.path.resolve().name} offsets" if name is None else name),
        Entry("adapter.type", "string", "lora"),
        Entry("adapter.lora.alpha", "float32", 0.0),
        *architecture(family, model.config),
        Entry("qalora.version", "string", __version__),
        Entry("qalora.layout", "string", "split"),
        Entry("qalora.checkpoint.sha256", "string", parent_of(model.path, "checkpoint").sha256),
    ]


def plan_remainders(model: CanonicalCheckpoint) -> list[TensorPlan]:
    """lora_a and lora_b of every quantized module whose offset is not −z·s already.

    Loading rows of lora_b raises InputError where a remainder is not exact in float32.
    """
    family = family_of(model.config)
    names = NameMap(family.gguf_arch, model.config["num_hidden_layers"])
    plans: list[TensorPlan] = []
    for module, (bits, group_size) in model.modules.items():
        zero = base_type(bits).implied_zero(bits)
        rows, groups = model.entry(f"{module}.scale").shape
        if zero is None or not _any_remainder(model, module, zero, rows):
            continue
        name = names.to_gguf(f"{module}.weight")
        load_a = functools.partial(_indicator_rows, groups, group_size)
        load_b = functools.partial(_remainder_rows, model, family, module, zero)
        plans.append(TensorPlan(f"{name}.lora_a", F32, (groups, groups * group_size), load_a))
        plans.append(TensorPlan(f"{name}.lora_b", F32, (rows, groups), load_b))
    return plans


def _any_remainder(model: CanonicalCheckpoint, module: str, zero: int, rows: int) -> bool:
    """Whether any remainder is not 0: most matrices say so in their first rows."""
    matrix, where = model.packed(module), f"{model.path}: {module}"
    return any(
        remainder(matrix.scale[part], matrix.offset[part], zero, where=where).any()
        for part in row_blocks(rows, matrix.scale.nbytes, SLAB_BYTES)
    )


def _indicator_rows(groups: int, group_size: int, rows: slice) -> NDArray[np.float32]:
    return group_indicator(groups, group_size, rows)


def _remainder_rows(
    model: CanonicalCheckpoint, family: Family, module: str, zero: int, rows: slice
) -> NDArray[np.float32]:
    wanted = gguf_order(model, family, module, rows)
    scale, offset = (np.asarray(model.tensor(f"{module}.{part}")[wanted]) for part in ("scale", "offset"))
    return remainder(scale, offset, zero, where=f"{model.path}: {module}")
