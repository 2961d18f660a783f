"""Import of checkpoints in GPTQ format (AutoGPTQ, GPTQModel): their own codes and scales, nothing is quantized again.

The value of a weight is w = s·(q − z) = s·q + m with m = −z·s; m rounds to fp16 unless z has few enough bits, and then
we count what changes. The tensors: gptq_layer. Which of two ways to store z: gptq_version. How to undo it: gptq_zeros.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qalora_export.checkpoint.canonical_writer import CanonicalWriter
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.errors import InputError
from qalora_export.grid import GroupAffine, narrow
from qalora_export.memory import peak_rss_bytes
from qalora_export.models.families import family_of
from qalora_export.models.skeleton import Skeleton
from qalora_export.progress import track
from qalora_export.quantization.gptq_layer import PARTS, Stored, check_layer, read_layer
from qalora_export.quantization.gptq_version import ZeroFormat, choose_version
from qalora_export.quantization.report import REPORT, ModuleReport, QuantizeReport, record
from qalora_export.quantization.source import Source
from qalora_export.recipe import QuantizeSettings


def import_gptq(
    source: Source, gptq: Mapping[str, Any], out: Path, settings: QuantizeSettings, *, force: bool
) -> QuantizeReport:
    """Write `source`, a checkpoint in GPTQ format with quantization config `gptq`, as canonical checkpoint `out`.

    Raises InputError when a layer cannot be carried over exactly as it is: columns in another order (desc_act), an
    unknown or contradictory format version, zero points its packer lost, an unknown packing, non-zero biases the model
    has no place for.
    """
    began = time.perf_counter()
    folder = source.folder
    family_of(folder.config)
    if settings.rules or settings.preset:
        raise InputError(
            f"{'rules' if settings.rules else 'a preset'} cannot be applied to a checkpoint that is quantized already",
            where=folder.path,
            fix="remove them, or start from the unquantized model",
        )
    skeleton = Skeleton(folder, torch.device("cpu"))
    widths = {name: (linear.out_features, linear.in_features) for name, linear in skeleton.linears().items()}
    modules = [name for name in widths if f"{name}.qweight" in folder]
    biasless = {name for name, linear in skeleton.linears().items() if linear.bias is None}
    if not modules:
        raise InputError("no quantized layers found", where=folder.path, why="the config says GPTQ, no tensor does")
    shapes = {name: widths[name] for name in modules}
    packed = packed_in(folder, gptq, shapes, settings.checkpoint_format)
    zeros = packed.zeros
    recorded = {
        "method": "import-gptq",
        "checkpoint_format": zeros.version,
        "checkpoint_format_reason": zeros.reason,
    } | source.recorded
    with CanonicalWriter(
        out,
        folder.config,
        folder.companions(),
        kind="base",
        settings=recorded,
        force=force,
        parents=[source.parent],
    ) as writer:
        reports = []
        for name in track(modules, "import (gptq)"):
            matrix, report = packed.matrix(name)
            writer.add_quantized(name, matrix)
            reports.append(report)
        kept, dropped = _copy_rest(folder, writer, modules, biasless)
        notes = [*source.notes, f"format: {zeros.reason}", *zeros.notes, *_notes(reports, dropped)]
        writer.add_json(REPORT, record("import-gptq", reports, kept=kept, calibration_tokens=0, notes=notes))
    return QuantizeReport(
        out, "import-gptq", tuple(reports), kept, 0, time.perf_counter() - began, peak_rss_bytes(), None, tuple(notes)
    )


@dataclass(frozen=True, slots=True)
class PackedGptq:
    """The matrices of a folder in GPTQ format. shapes: (out, in) of each."""

    folder: ModelFolder
    gptq: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, int]]
    zeros: ZeroFormat

    def matrix(self, name: str) -> tuple[GroupAffine, ModuleReport]:
        """In canonical form, and how many weights that changes. Raises InputError as import_gptq does."""
        layer = check_layer(self.folder, name, self.shapes[name], self.gptq)
        return convert(read_layer(self.folder, name, layer, self.zeros.rule(layer.bits)), name=name)


def packed_in(
    folder: ModelFolder, gptq: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], version: str | None
) -> PackedGptq:
    """version: how zero points are stored, None where the values are to tell. Raises InputError as choose_version."""
    return PackedGptq(folder, gptq, shapes, choose_version(folder, gptq, shapes, version))


def convert(stored: Stored, *, name: str) -> tuple[GroupAffine, ModuleReport]:
    """The canonical matrix, and how many weights s·(q − z) it changes. Raises InputError for NaN or overflow."""
    scale = narrow(stored.scales, np.float16, where=f"{name}.scales").values
    exact = -stored.zeros.astype(np.float64) * stored.scales.astype(np.float64) + 0.0  # + 0.0: no −0
    offset = narrow(exact, np.float16, where=f"{name}: offset").values
    matrix = GroupAffine(stored.codes, scale, offset, stored.bits)
    return matrix, _report(name, matrix, stored)


def _report(name: str, matrix: GroupAffine, stored: Stored) -> ModuleReport:
    shape = (*stored.zeros.shape, -1)  # (out, G, g)
    scales = stored.scales.astype(np.float64)[..., None]
    exact = scales * (stored.codes.reshape(shape).astype(np.int64) - stored.zeros[..., None])
    error = matrix.dequantize().astype(np.float64).reshape(exact.shape) - exact
    norm = float(np.linalg.norm(exact))
    return ModuleReport(
        name,
        matrix.shape,
        matrix.bits,
        matrix.group_size,
        matrix.is_symmetric,
        float(np.linalg.norm(error)) / norm if norm else 0.0,
        None,
        int(np.count_nonzero(error)),
        float(np.abs(error).max()),
    )


def _copy_rest(folder: ModelFolder, writer: CanonicalWriter, modules: list[str], biasless: set[str]) -> tuple[int, int]:
    """Copy every other tensor bit for bit; returns how many, and how many all-zero biases were left out."""
    packed = {f"{name}.{part}" for name in modules for part in PARTS}
    kept = dropped = 0
    for name in folder.names():
        module, _, leaf = name.rpartition(".")
        if name in packed:
            continue
        if leaf == "bias" and module in biasless:
            if np.count_nonzero(np.asarray(folder.tensor(name)).astype(np.float32)):
                raise InputError(
                    "a bias is not zero but the model has no place for it",
                    where=f"{folder.path}: {name}",
                    fix="is config.json of this model?",
                )
            dropped += 1
            continue
        writer.add(name, np.asarray(folder.tensor(name)))
        kept += 1
    return kept, dropped


def _notes(reports: list[ModuleReport], dropped: int) -> list[str]:
    notes = ["codes and scales are the checkpoint's own; bits, group size and method of the settings were not used"]
    changed, total = sum(r.changed for r in reports), sum(r.total for r in reports)
    if changed:
        notes.append(
            f"{changed} of {total} weights change, by at most {max(r.largest_change for r in reports):.3g}: "
            "scale or offset −z·s is not exact in fp16"
        )
    if dropped:
        notes.append(f"{dropped} biases that are all zero and not part of the architecture were left out")
    return notes
