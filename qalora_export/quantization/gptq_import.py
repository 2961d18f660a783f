"""Import of checkpoints in GPTQ format (AutoGPTQ, GPTQModel): their own codes and scales, nothing is quantized again.

The format, for a layer of `in` × `out` with G groups along in-features:

    qweight int32 (in·b/32, out)   codes; a column's words, one after the other, are one string of bits, low bit first
    qzeros  int32 (G, out·b/32)    zero points z, packed the same way along out; v1 stores z − 1, v2 stores z
    scales  float (G, out)
    g_idx   int32 (in,)            group of each column; must be i // g here

so at 3 bits a code may straddle two words. Read as bytes, a transposed qweight is grid.packing's layout. The value is
w = s·(q − z) = s·q + m with m = −z·s; m rounds to fp16 unless z has few enough bits, and then we count what changes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import CanonicalWriter
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.errors import InputError
from qalora_export.grid import BITS, GROUP_SIZES, GroupAffine, narrow, unpack_codes
from qalora_export.memory import peak_rss_bytes
from qalora_export.models.families import family_of
from qalora_export.models.skeleton import Skeleton
from qalora_export.progress import track
from qalora_export.quantization.gptq_version import choose_version
from qalora_export.quantization.report import REPORT, ModuleReport, QuantizeReport, record
from qalora_export.quantization.source import Source
from qalora_export.recipe import QuantizeSettings

PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True, slots=True)
class Stored:
    """One layer as the file has it: codes (out, in), stored zeros (out, G), scales (out, G) in their own dtype."""

    codes: NDArray[np.uint8]
    zeros: NDArray[np.uint8]
    scales: NDArray[Any]
    bits: int


def import_gptq(
    source: Source, gptq: Mapping[str, Any], out: Path, settings: QuantizeSettings, *, force: bool
) -> QuantizeReport:
    """Write `source`, a checkpoint in GPTQ format with quantization config `gptq`, as canonical checkpoint `out`.

    Raises InputError when a layer cannot be carried over exactly as it is: columns in another order (desc_act), an
    unknown or contradictory format version, an unknown packing, non-zero biases the model has no place for.
    """
    began = time.perf_counter()
    folder = source.folder
    family_of(folder.config)
    if settings.rules:
        raise InputError(
            "rules cannot be applied to a checkpoint that is quantized already",
            where=folder.path,
            fix="remove the rules, or start from the unquantized model",
        )
    skeleton = Skeleton(folder, torch.device("cpu"))
    widths = {name: (linear.out_features, linear.in_features) for name, linear in skeleton.linears().items()}
    modules = [name for name in widths if f"{name}.qweight" in folder]
    biasless = {name for name, linear in skeleton.linears().items() if linear.bias is None}
    if not modules:
        raise InputError("no quantized layers found", where=folder.path, why="the config says GPTQ, no tensor does")
    version, notes = choose_version(folder, gptq, {name: widths[name] for name in modules}, settings.checkpoint_format)
    recorded = {"method": "import-gptq", "checkpoint_format": version} | source.recorded
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
            matrix, report = convert(read_stored(folder, name, widths[name], gptq), version, name=name)
            writer.add_quantized(name, matrix)
            reports.append(report)
        kept, dropped = _copy_rest(folder, writer, modules, biasless)
        notes = [*source.notes, *notes, *_notes(reports, dropped)]
        writer.add_json(REPORT, record("import-gptq", reports, kept=kept, calibration_tokens=0, notes=notes))
    return QuantizeReport(
        out, "import-gptq", tuple(reports), kept, 0, time.perf_counter() - began, peak_rss_bytes(), None, tuple(notes)
    )


def read_stored(folder: ModelFolder, name: str, shape: tuple[int, int], gptq: Mapping[str, Any]) -> Stored:
    """Unpack one layer of shape (out, in). Raises InputError for shapes, dtypes or an order we cannot carry over."""
    out, width = shape
    where = f"{folder.path}: {name}"
    qweight, qzeros, scales = (np.asarray(folder.tensor(f"{name}.{part}")) for part in PARTS[:3])
    bits = qweight.shape[0] * 32 // width if qweight.ndim == 2 else 0
    groups = scales.shape[0] if scales.ndim == 2 else 0
    expected = ((width * bits // 32, out), (groups, out * bits // 32), (groups, out))
    if bits not in BITS or (qweight.shape, qzeros.shape, scales.shape) != expected or width % max(groups, 1):
        raise InputError(
            f"qweight {qweight.shape}, qzeros {qzeros.shape}, scales {scales.shape} do not fit a layer of "
            f"{out} × {width}",
            where=where,
            fix="is this a GPTQ checkpoint of this model?",
        )
    if qweight.dtype != np.int32 or qzeros.dtype != np.int32:
        raise InputError(f"packed in {qweight.dtype}, expected int32", where=where)
    if bits != gptq.get("bits") and not gptq.get("dynamic"):
        raise InputError(f"the layer has {bits} bits, the config says {gptq.get('bits')}", where=where)
    _check_order(folder, name, width // groups, bool(gptq.get("desc_act")))
    return Stored(_unpack(qweight.T, bits), _unpack(qzeros, bits).T, scales.T, bits)


def convert(stored: Stored, version: str, *, name: str) -> tuple[GroupAffine, ModuleReport]:
    """The canonical matrix, and how many weights s·(q − z) it changes. Raises InputError for an ambiguous zero."""
    zeros = stored.zeros.astype(np.int64)
    if version == "gptq":
        if (zeros == 2**stored.bits - 1).any():
            raise InputError(
                f"a stored zero of {2**stored.bits - 1} has no certain meaning in format gptq (v1)",
                where=name,
                why=f"readers take it for {2**stored.bits} or, wrapped around, for 0",
                fix="if the file is really v2 pass --checkpoint-format gptq_v2",
            )
        zeros = zeros + 1
    scale = narrow(stored.scales, np.float16, where=f"{name}.scales").values
    offset = narrow(-zeros * stored.scales.astype(np.float64) + 0.0, np.float16, where=f"{name}: offset").values
    repeat = _repeat(stored.codes.shape[1] // scale.shape[1], where=name)
    matrix = GroupAffine(stored.codes, np.repeat(scale, repeat, axis=1), np.repeat(offset, repeat, axis=1), stored.bits)
    return matrix, _report(name, matrix, stored, zeros)


def _report(name: str, matrix: GroupAffine, stored: Stored, zeros: NDArray[np.int64]) -> ModuleReport:
    shape = (*zeros.shape, -1)  # (out, G, g)
    scales = stored.scales.astype(np.float64)[..., None]
    exact = scales * (stored.codes.reshape(shape).astype(np.int64) - zeros[..., None])
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


def _unpack(words: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """int32 (rows, n·b/32), each row one string of bits -> uint8 (rows, n)."""
    return unpack_codes(np.ascontiguousarray(words).astype("<i4").view(np.uint8), bits)


def _repeat(group: int, *, where: str) -> int:
    """How often a group's scale and offset are written so that the group size is one we have (whole rows: group -1)."""
    fitting = [size for size in GROUP_SIZES if group % size == 0]
    if not fitting:
        raise InputError(f"group size {group} is no multiple of {GROUP_SIZES[0]}", where=where)
    return group // fitting[-1]


def _check_order(folder: ModelFolder, name: str, group: int, desc_act: bool) -> None:
    where = f"{folder.path}: {name}.g_idx"
    if f"{name}.g_idx" not in folder:
        if desc_act:
            raise InputError("desc_act without g_idx", where=where, fix="the checkpoint is incomplete")
        return
    order = np.asarray(folder.tensor(f"{name}.g_idx"))
    if not np.array_equal(order, np.arange(len(order)) // group):
        raise InputError(
            "the columns of a group do not lie together (desc_act, activation order)",
            where=where,
            why="every format we write holds the columns of a group side by side",
            fix="quantize the source model with desc_act off, or here",
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
