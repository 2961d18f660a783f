"""A trained QA-LoRA adapter as a llama.cpp LoRA file: many fine-tunes over one exported base.

    y = W_base · x + lora_b · (lora_a · x)      lora_a = A spread over each pool (r, in)      lora_b = α/r · B (out, r)

llama.cpp adds this to whatever layout the base was exported in. It equals the merged model but for one thing: merging
rounds offset_eff to fp16 and the adapter does not, so each offset may differ by half a unit in its last place. The
report counts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.manifest import Parent, parent_of, sidecar_path, write_sidecar
from qalora_export.checkpoint.output import claim_output
from qalora_export.errors import InputError, ParityError
from qalora_export.formats.gguf.file import GgufFile
from qalora_export.formats.gguf.names import NameMap
from qalora_export.formats.gguf.permute import row_order
from qalora_export.formats.gguf.split import adapter_entries
from qalora_export.formats.gguf.tensor_table import TensorPlan
from qalora_export.formats.gguf.types import F32
from qalora_export.formats.gguf.writer import write_gguf
from qalora_export.grid import AFFINE16, differing
from qalora_export.models.families import family_of
from qalora_export.safety import atomic_files


@dataclass(frozen=True, slots=True)
class LowRank:
    """a float32 (r, in/pool), b float32 (out, r), scaling of b·a for a sum over each pool of in-features."""

    a: NDArray[np.float32]
    b: NDArray[np.float32]
    scaling: float


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """offsets: how many the adapter moves; rounded: of those, how many differ from the merged, fp16 ones; largest:
    the largest such difference; nmse: their squared sum over that of the update."""

    path: Path
    modules: int
    nbytes: int
    offsets: int
    rounded: int
    largest: float
    nmse: float


def write_adapter(
    base: Path, modules: Mapping[str, LowRank], out: Path, *, parent: Parent, force: bool = False
) -> AdapterReport:
    """Write a LoRA GGUF for `base`, read it back bit for bit, then its manifest. parent: the adapter folder.

    Raises InputError when an adapter does not fit a module of the base.
    """
    with claim_output(out, force=force, inputs=[base]), claim_output(sidecar_path(out), force=force):
        return _write_adapter(base, modules, out, parent=parent, force=force)


def _write_adapter(
    base: Path, modules: Mapping[str, LowRank], out: Path, *, parent: Parent, force: bool
) -> AdapterReport:
    model = CanonicalCheckpoint(base)
    arrays = _arrays(model, modules)
    plans = [TensorPlan(name, F32, array.shape, array.__getitem__) for name, array in arrays.items()]
    with atomic_files((out, sidecar_path(out)), force=force) as (temporary, manifest):
        written = write_gguf(
            temporary, family_of(model.config).gguf_arch, adapter_entries(model), plans, description="write adapter"
        )
        _check(temporary, arrays, out)
        parents = [parent_of(base, "checkpoint"), parent]
        write_sidecar(
            manifest,
            {out.name: temporary},
            written.tensors,
            parents,
            {"layout": "adapter"},
            digests={out.name: written.sha256},
        )
    offsets, rounded, largest, error, update = _rounding(model, modules)
    return AdapterReport(
        out, len(modules), out.stat().st_size, offsets, rounded, largest, error / update if update else 0
    )


def _arrays(model: CanonicalCheckpoint, modules: Mapping[str, LowRank]) -> dict[str, NDArray[np.float32]]:
    """GGUF tensor name -> lora_a and lora_b, rows of b in GGUF order."""
    family = family_of(model.config)
    names = NameMap(family.gguf_arch, model.config["num_hidden_layers"])
    arrays: dict[str, NDArray[np.float32]] = {}
    for module, found in modules.items():
        rows, columns = _shape(model, module)
        if found.b.shape != (rows, found.a.shape[0]) or columns % found.a.shape[1]:
            raise InputError(
                f"adapter matrices {found.a.shape} and {found.b.shape} do not fit ({rows}, {columns})",
                where=module,
                fix="give the base the adapter was trained on",
            )
        name = names.to_gguf(f"{module}.weight")
        b = (np.float64(found.scaling) * found.b).astype(np.float32)
        heads = family.permuted_heads(module, model.config)
        arrays[f"{name}.lora_a"] = np.repeat(found.a, columns // found.a.shape[1], axis=1)
        arrays[f"{name}.lora_b"] = b if heads is None else b[row_order(rows, heads)]
    if not arrays:
        raise InputError("the adapter holds no modules", where=model.path)
    return arrays


def _shape(model: CanonicalCheckpoint, module: str) -> tuple[int, int]:
    if module not in model.modules:
        raise InputError("the adapter targets a module that the base has not quantized", where=module)
    if (grid := model.grids[module]) is not AFFINE16:
        raise InputError(
            f"an adapter file is not what was trained over grid {grid.name}",
            where=f"{model.path}: {module}",
            why="training rounds its offsets to levels, llama.cpp would add them unrounded",
            fix="merge, and export the merged checkpoint",
        )
    rows, groups = model.entry(f"{module}.scale").shape
    return rows, groups * model.modules[module][1]


def _check(path: Path, arrays: Mapping[str, NDArray[np.float32]], out: Path) -> None:
    found = {name: tensor.values for name, tensor in GgufFile(path).tensors.items()}
    wrong = sum(differing(array, found[name]) if name in found else array.size for name, array in arrays.items())
    if wrong or set(found) != set(arrays):
        raise ParityError(
            f"{wrong} adapter values differ when the file is read back",
            where=out,
            fix="this is a defect of the exporter: please report it; nothing was written",
        )


def _rounding(model: CanonicalCheckpoint, modules: Mapping[str, LowRank]) -> tuple[int, int, float, float, float]:
    """(offsets, how many fp16 rounds, largest difference, squared error, squared update), in float64."""
    offsets = rounded = 0
    largest = error = update = 0.0
    for module, found in modules.items():
        before = np.asarray(model.tensor(f"{module}.offset")).astype(np.float64)
        delta = found.scaling * (found.b.astype(np.float64) @ found.a.astype(np.float64))
        delta = np.repeat(delta, before.shape[1] // delta.shape[1], axis=1)
        lost = (before + delta).astype(np.float16).astype(np.float64) - (before + delta)
        offsets, rounded = offsets + lost.size, rounded + int(np.count_nonzero(lost))
        largest = max(largest, float(np.abs(lost).max()))
        error, update = error + float((lost**2).sum()), update + float((delta**2).sum())
    return offsets, rounded, largest, error, update
