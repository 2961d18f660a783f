"""What a quantization did, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from qalora_export.grid import AFFINE16, GRIDS
from qalora_export.quantization.rules import Plan


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One matrix. relative_error = ‖Ŵ − W‖ / ‖W‖.  output_error = tr(E H Eᵀ) / tr(W H Wᵀ), E = Ŵ − W: the normalized
    mean squared error of the layer's output on the calibration text; None without calibration.
    changed: weights whose value differs from the source's, of `total`; largest_change: by how much at most. grid: by
    name.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    sym: bool
    relative_error: float
    output_error: float | None
    changed: int
    largest_change: float
    grid: str = AFFINE16.name

    @property
    def kind(self) -> str:
        """What kind of module it is: the last part of its name, for example q_proj."""
        return self.name.rpartition(".")[2]

    @property
    def total(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def bits_per_weight(self) -> float:
        return GRIDS[self.grid].bits_per_weight(self.bits, self.group_size)


def report_of(name: str, plan: Plan, weight: Tensor, result: Tensor, hessian: Tensor | None) -> ModuleReport:
    """What quantizing weight (out, in) to result did; hessian (in, in) of its inputs, where there is one."""
    error = result - weight
    norm = float(weight.norm())
    output_error = None
    if hessian is not None:
        h = hessian.float()
        power = float(((weight @ h) * weight).sum(dtype=torch.float64))
        output_error = float(((error @ h) * error).sum(dtype=torch.float64)) / power if power else 0.0
    return ModuleReport(
        name,
        (weight.shape[0], weight.shape[1]),
        plan.bits,
        plan.group_size,
        plan.sym,
        float(error.norm()) / norm if norm else 0.0,
        output_error,
        int(torch.count_nonzero(error)),
        float(error.abs().max()),
        plan.grid.name,
    )


REPORT = "quantize_report.json"


def record(
    method: str, modules: Sequence[ModuleReport], *, kept: int, calibration_tokens: int, notes: Sequence[str] = ()
) -> dict[str, object]:
    """The content of quantize_report.json in the checkpoint: every module. It holds nothing that differs between two
    runs with equal inputs, such as times.
    """
    rows = [asdict(module) | {"bits_per_weight": module.bits_per_weight} for module in modules]
    for row in rows:
        if row["grid"] == AFFINE16.name:
            del row["grid"]
    return {
        "method": method,
        "calibration_tokens": calibration_tokens,
        "kept": kept,
        "notes": list(notes),
        "modules": rows,
    }


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """The whole model. kept: tensors copied bit for bit; peak bytes are of this process and of CUDA (None without)."""

    out: Path
    method: str
    modules: tuple[ModuleReport, ...]
    kept: int
    calibration_tokens: int
    seconds: float
    peak_rss_bytes: int
    peak_cuda_bytes: int | None
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        return sum(module.total for module in self.modules)

    @property
    def bits_per_weight(self) -> float:
        """Average over the quantized matrices, scale and offset included."""
        return sum(module.bits_per_weight * module.total for module in self.modules) / self.weights

    @property
    def changed(self) -> int:
        return sum(module.changed for module in self.modules)
