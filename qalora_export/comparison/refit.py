"""The offsets with the least output error for given codes and scales, in closed form: a start for QA-LoRA.

    error of a row = E H Eᵀ,  E = Ŵ − W
    ∂/∂m_g = 0 for all groups g:        Σ_h (Σ_{i∈g, j∈h} H_ij) Δm_h = −Σ_{i∈g} (E H)_i

One system for all rows, of in/g unknowns. `[quantize] sweeps` solves scales as well and chooses codes anew; this moves
what QA-LoRA's adapter moves, without its bound on the rank, so it shows what the start alone is worth.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.canonical_writer import CanonicalWriter
from qalora_export.checkpoint.manifest import parent_of
from qalora_export.grid import GroupAffine
from qalora_export.quantization.refine import output_error


def refitted(matrix: GroupAffine, weight: Tensor, hessian: Tensor) -> GroupAffine:
    """The matrix with other offsets; rows that rounding to float16 made worse keep theirs.

    weight (out, in); hessian (in, in), damped, float64.
    """
    target = weight.double()
    groups = matrix.offset.shape[1]
    before = torch.from_numpy(matrix.dequantize()).double() - target
    pull = (before @ hessian).unflatten(1, (groups, -1)).sum(-1)  # (out, in/g)
    system = hessian.unflatten(0, (groups, -1)).unflatten(-1, (groups, -1)).sum((1, 3))
    step = torch.linalg.solve(system, pull.T).T
    offset = (matrix.offset.astype(np.float64) - step.numpy()).astype(np.float16)
    changed = GroupAffine(matrix.codes, matrix.scale, offset, matrix.bits)
    after = torch.from_numpy(changed.dequantize()).double() - target
    better = (output_error(after, hessian) < output_error(before, hessian)).numpy()
    kept = np.where(better[:, None], offset, matrix.offset)
    return GroupAffine(matrix.codes, matrix.scale, kept, matrix.bits)


def write_refitted(base: Path, weights: dict[str, Tensor], hessians: dict[str, Tensor], out: Path) -> None:
    """The canonical checkpoint `out`: `base` with refitted offsets. weights, hessians: of every module to refit."""
    checkpoint = CanonicalCheckpoint(base)
    parents, settings = [parent_of(base, "base")], {"method": "offsets refitted on the Hessian"}
    with CanonicalWriter(
        out, checkpoint.config, checkpoint.companions(), kind="base", parents=parents, settings=settings
    ) as writer:
        for name in checkpoint.modules:
            matrix = checkpoint.group_affine(name)
            writer.add_quantized(name, refitted(matrix, weights[name], hessians[name]) if name in weights else matrix)
        writer.add_rest_of(checkpoint)
