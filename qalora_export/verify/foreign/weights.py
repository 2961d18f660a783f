"""Weights: every tensor of the artifact against the source's, by what its type can hold (holding.py).

A tensor is wrong when its error is more than a right tool leaves in its type, when it does not point the way the source
does, when single blocks stand out from its own others, or when all of it is scaled. What is wrong with it is then found
by trying (causes.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.progress import track
from qalora_export.verify.foreign.artifact import Foreign
from qalora_export.verify.foreign.causes import cause_of
from qalora_export.verify.foreign.fit import Fit, fit, source_of


@dataclass(frozen=True, slots=True)
class Finding:
    """One tensor. cause: what is wrong with it, "" where nothing is; fit: None where it cannot be compared."""

    name: str
    stored_as: str
    kind: str
    values: int
    fit: Fit | None
    cause: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)


def compared(artifact: Foreign, folder: ModelFolder, heads: Mapping[str, int]) -> list[Finding]:
    """Every tensor of the artifact, in its order. heads: module leaf -> head count, for what may be permuted."""
    found = []
    for name, tensor in track(list(artifact.tensors.items()), "weights, tensors"):
        source = source_of(folder, name)
        size = int(np.prod(tensor.shape))
        if source is None:
            found.append(Finding(name, tensor.stored_as, tensor.kind, size, None, _unknown(name)))
            continue
        if tuple(source.shape) != tuple(tensor.shape):
            cause = cause_of(tensor, source, None, folder, heads)
            found.append(Finding(name, tensor.stored_as, tensor.kind, size, None, cause))
            continue
        near = fit(tensor, source)
        cause = "" if near.right else cause_of(tensor, source, near, folder, heads)
        found.append(Finding(name, tensor.stored_as, tensor.kind, size, near, cause))
    return found


def _unknown(name: str) -> str:
    return "a bias that the model does not have" if name.endswith(".bias") else "the model has no such tensor"
