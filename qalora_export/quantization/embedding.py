"""An embedding into blocks: rounded to nearest, some rows at a time, before anything reads it.

Calibration runs on the embedding that the checkpoint will hold. One that a GGUF file holds on a grid of ours is taken
as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import WEIGHT, parts_of, values_of
from qalora_export.checkpoint.canonical_writer import CanonicalWriter
from qalora_export.checkpoint.model_folder import as_float32
from qalora_export.grid import GroupAffine
from qalora_export.models.skeleton import Skeleton
from qalora_export.quantization.gguf_source import GgufModel
from qalora_export.quantization.report import ModuleReport, report_of
from qalora_export.quantization.rtn import round_to_nearest
from qalora_export.quantization.rules import Plan

VALUES = 1 << 22  # that are fitted at a time, in float64 and several copies


def quantize_embedding(skeleton: Skeleton, name: str, plan: Plan, writer: CanonicalWriter) -> ModuleReport:
    """Write the embedding `name` in blocks, and let the skeleton read what was written."""
    folder, tensor = skeleton.folder, f"{name}{WEIGHT}"
    weight = torch.from_numpy(as_float32(folder.tensor(tensor)))
    if isinstance(folder, GgufModel) and folder.embedding_plan(name) is not None:
        matrix = folder.embedding(name)
    else:
        step = max(1, VALUES // weight.shape[1])
        where = f"{folder.path}: {tensor}"
        matrix = _zeros_in_the_middle(
            stacked([round_to_nearest(rows, plan, where=where) for rows in weight.split(step)])
        )
    writer.add_embedding(name, matrix)
    skeleton.instead[tensor] = lambda: values_of(matrix)
    return report_of(name, plan, weight, torch.from_numpy(values_of(matrix)), None)


def _zeros_in_the_middle(matrix: GroupAffine) -> GroupAffine:
    """Groups of zeros, such as the row of a padding token, with the code that stands for 0 where that is symmetric.

    Their scale is 0, so any code has the value 0; but a runtime's d·(q − middle) makes −0 of the lower ones.
    """
    if matrix.levels is None and matrix.is_symmetric:
        groups = matrix.codes.reshape(*matrix.scale.shape, -1)
        groups[matrix.scale == 0] = 2 ** (matrix.bits - 1)
    return matrix


def stacked(parts: Sequence[GroupAffine]) -> GroupAffine:
    """One matrix of the rows of several, all on one grid."""

    def rows(name: str, of: Sequence[object]) -> NDArray[Any]:
        return np.concatenate([getattr(each, name) for each in of])

    codes, levels = np.concatenate([part.codes for part in parts]), [part.levels for part in parts]
    first = levels[0]
    if first is None:
        return GroupAffine(codes, rows("scale", parts), rows("offset", parts), parts[0].bits)
    numbers: dict[str, Any] = {name: rows(name, levels) for name in parts_of(first.grid)[1:]}
    return GroupAffine.on_levels(codes, replace(first, **numbers))
