"""LQ-LoRA's start (arXiv 2311.12023, Algorithm 1): W ≈ Q + L₁L₂ by turns of quantization and SVD.

    repeat   L = the best rank-r matrix for W − Q;   Q = quantize(W − L)
    keep     the pair with the smallest error so far

Q here is on our own grid, so that the frozen part is a canonical checkpoint's; optionally every row and column weighs
by its Fisher information, as the paper's diagonal approximation does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TURNS = 20  # at most; the error grows again long before


@dataclass(frozen=True, slots=True)
class Split:
    """quantized: float32 (out, in) on the grid. a (r, in), b (out, r). error: of their sum, relative (Frobenius)."""

    quantized: Tensor
    a: Tensor
    b: Tensor
    error: float
    turn: int


def split(
    weight: Tensor,
    rank: int,
    quantize: Callable[[Tensor], Tensor],
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    turns: int = TURNS,
) -> Split:
    """The best Q + L₁L₂ of at most `turns` turns for weight (out, in).

    quantize: weight -> the same on the grid. rows (out,), columns (in,): importance of each, above zero; the error is
    then that of diag(rows)·(W − Q − L)·diag(columns). Stops when a turn is worse than the one before it.
    """
    weight = weight.float()
    left = torch.ones(weight.shape[0]) if rows is None else rows.float()
    right = torch.ones(weight.shape[1]) if columns is None else columns.float()
    norm = float((left[:, None] * weight * right).norm())
    a, b = torch.zeros(rank, weight.shape[1]), torch.zeros(weight.shape[0], rank)
    best: Split | None = None
    for turn in range(turns):
        quantized = quantize(weight - b @ a)
        a, b = _low_rank(weight - quantized, rank, left, right)
        error = float((left[:, None] * (weight - quantized - b @ a) * right).norm()) / norm if norm else 0.0
        if best is not None and error >= best.error:
            break
        best = Split(quantized, a, b, error, turn)
    assert best is not None
    return best


def _low_rank(rest: Tensor, rank: int, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) of the best rank-`rank` matrix under the weights, its singular values shared evenly between both."""
    u, s, vt = torch.linalg.svd(left[:, None] * rest * right, full_matrices=False)
    root = s[:rank].sqrt()
    return (root[:, None] * vt[:rank]) / right, (u[:, :rank] * root) / left[:, None]
