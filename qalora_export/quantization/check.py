"""The checks of the quantize stage without its work: what it will write, or why it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qalora_export.checkpoint.forecast import Forecast
from qalora_export.checkpoint.safetensors_file import TensorEntry
from qalora_export.errors import InputError
from qalora_export.formats.gguf.types import BLOCK_TYPES
from qalora_export.models.families import family_of
from qalora_export.models.skeleton import Skeleton
from qalora_export.models.sources import locate
from qalora_export.quantization.gguf_source import GgufModel
from qalora_export.quantization.gptq_layer import PARTS, check_layer, written_grid
from qalora_export.quantization.gptq_version import choose_version
from qalora_export.quantization.source import gptq_config, notes_of, open_folder
from qalora_export.quantization.stage import calibration, plan_modules
from qalora_export.recipe import QuantizeSettings
from qalora_export.safety import StrPath


@contextmanager
def open_forecast(
    model: StrPath, settings: QuantizeSettings, scratch: Path, *, revision: str | None = None
) -> Iterator[Forecast]:
    """What `quantize` will make of a model, found and opened as the stage does it; headers are read, no weight is.

    The forecast's folder is there until the block ends. scratch: an empty folder, which becomes that of a GGUF file.
    Calibration is a check of its own. Raises InputError and UnsafeInputError as the stage itself would.
    """
    with open_folder(locate(model, revision), nullcontext(scratch), dequantize=settings.dequantize) as folder:
        packed = gptq_config(folder)
        family_of(folder.config)
        skeleton = Skeleton(folder, torch.device("cpu"))
        yield _planned(skeleton, settings) if packed is None else _packed(skeleton, packed, settings)


def calibrated(forecast: Forecast, settings: QuantizeSettings) -> Forecast:
    """The forecast with the number of calibration tokens. Raises InputError for an unusable text, or none."""
    if settings.method != "gptq" or forecast.modules.keys() == forecast.kept:
        return forecast
    return replace(forecast, calibration_tokens=calibration(forecast.folder, settings).size)


def _planned(skeleton: Skeleton, settings: QuantizeSettings) -> Forecast:
    folder = skeleton.folder
    skeleton.check_complete()
    planned = plan_modules(skeleton, settings)
    stored, plans = planned.stored, planned.plans
    symmetric = {name for name, plan in plans.items() if plan.sym}
    codes = dict[str, tuple[int, int]]()
    if isinstance(folder, GgufModel):
        for name in stored:
            kind = BLOCK_TYPES[folder.stored_type(name)]
            codes[name] = (kind.first, kind.first + 2**kind.code_bits - 1)
            symmetric |= {name} if kind.zero is not None else set()
    modules = {name: (plan.bits, plan.group_size) for name, plan in plans.items()}
    found = _forecast(skeleton, modules, {f"{name}.weight" for name in modules})
    embeddings = {name: (plan.bits, plan.group_size, plan.grid) for name, plan in planned.embeddings.items()}
    plain = dict(found.plain) | {
        f"{name}.weight": TensorEntry(np.dtype(np.float32), found.plain[f"{name}.weight"].shape, 0)
        for name in embeddings
    }
    return replace(
        found,
        plain=plain,
        embeddings=embeddings,
        symmetric=frozenset(symmetric),
        codes=codes,
        kept=frozenset(stored),
        grids={name: plan.grid for name, plan in plans.items()},
        notes=(*notes_of(folder), *planned.notes),
    )


def _packed(skeleton: Skeleton, packed: dict[str, Any], settings: QuantizeSettings) -> Forecast:
    """Of a checkpoint in GPTQ format: shapes, version and order are checked, codes are not read."""
    folder = skeleton.folder
    if settings.rules or settings.preset:
        raise InputError(
            f"{'rules' if settings.rules else 'a preset'} cannot be applied to a checkpoint that is quantized already",
            where=folder.path,
            fix="remove them, or start from the unquantized model",
        )
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in skeleton.linears().items()}
    stored = {name: shape for name, shape in shapes.items() if f"{name}.qweight" in folder}
    if not stored:
        raise InputError("no quantized layers found", where=folder.path, why="the config says GPTQ, no tensor does")
    choose_version(folder, packed, stored, settings.checkpoint_format)
    modules = {
        name: written_grid(folder, name, check_layer(folder, name, shape, packed)) for name, shape in stored.items()
    }
    found = _forecast(skeleton, modules, {f"{name}.{part}" for name in modules for part in PARTS})
    symmetric = frozenset(modules) if packed.get("sym") else frozenset()
    notes = ("codes and scales are the checkpoint's own; bits, group size and method of the recipe are not used",)
    return replace(found, symmetric=symmetric, kept=frozenset(modules), notes=notes)


def _forecast(skeleton: Skeleton, modules: dict[str, tuple[int, int]], gone: set[str]) -> Forecast:
    """gone: tensors of the folder that become codes, scale and offset."""
    folder, linears = skeleton.folder, skeleton.linears()
    shapes = {name: (linears[name].out_features, linears[name].in_features) for name in modules}
    plain = {name: folder.entry(name) for name in folder.names() if name not in gone}
    return Forecast(folder, modules, shapes, plain)
