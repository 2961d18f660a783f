"""The same model with every tensor in F32, straight from the checkpoint: the oracle of verify/runtimes/twin.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.model_folder import as_float32
from qalora_export.formats.contents import exported_names
from qalora_export.formats.gguf.export import model_entries
from qalora_export.formats.gguf.names import NameMap
from qalora_export.formats.gguf.permute import row_order
from qalora_export.formats.gguf.tensor_table import TensorPlan, as_stored, plan_model
from qalora_export.formats.gguf.types import F32
from qalora_export.formats.gguf.writer import write_gguf
from qalora_export.grid import AFFINE16
from qalora_export.models.families import family_of


def f32_plans(model: CanonicalCheckpoint) -> list[TensorPlan]:
    """Quantized matrices by GroupAffine.dequantize; the others widened."""
    family, config = family_of(model.config), model.config
    names = NameMap(family.gguf_arch, config["num_hidden_layers"])

    def plan(name: str, shape: tuple[int, ...], value: Callable[[], NDArray[Any]]) -> TensorPlan:
        heads = family.permuted_heads(name.rpartition(".")[0], config)
        order = np.arange(shape[0]) if heads is None else row_order(shape[0], heads)
        return TensorPlan(names.to_gguf(name), F32, shape, lambda rows: as_stored(family, name, value()[order[rows]]))

    layout = "split" if all(grid is AFFINE16 for grid in model.grids.values()) else "q4_1"  # that holds every matrix
    plans = [found for found in plan_model(model, layout) if found.name.startswith("rope_")]
    for name in exported_names(model):
        plans.append(plan(name, model.entry(name).shape, lambda name=name: as_float32(model.tensor(name))))
    for module, (_, group) in model.modules.items():
        rows, groups = model.entry(f"{module}.scale").shape
        shape = (rows, groups * group)
        plans.append(plan(f"{module}.weight", shape, lambda name=module: model.group_affine(name).dequantize()))
    return plans


def write_f32_twin(checkpoint: Path, out: Path) -> list[TensorPlan]:
    """What was written."""
    model = CanonicalCheckpoint(checkpoint)
    plans = f32_plans(model)
    write_gguf(out, family_of(model.config).gguf_arch, model_entries(model, plans, "f32"), plans)
    return plans
