"""Slow and obvious: GPTQ as published, dense float64 numpy, one column at a time, no blocks, no Cholesky."""

from __future__ import annotations

import numpy as np


def min_max_grid(groups: np.ndarray, bits: int, *, sym: bool) -> tuple[np.ndarray, np.ndarray]:
    """(out, g) -> scale, offset (out,) as float64 that hold fp16 numbers."""
    low, high, middle = groups.min(1), groups.max(1), 2 ** (bits - 1)
    if sym:
        scale = np.maximum(-low / middle, high / (middle - 1)).astype(np.float16)
        return scale.astype(np.float64), -middle * scale.astype(np.float64)
    scale = ((high - low) / (2**bits - 1)).astype(np.float16)
    return scale.astype(np.float64), low.astype(np.float16).astype(np.float64)


def nearest(values: np.ndarray, scale: np.ndarray, offset: np.ndarray, bits: int) -> np.ndarray:
    """Codes of one column by trying every code; ties go to the even one, as IEEE rounding has it."""
    codes = np.arange(2**bits)
    distance = np.abs(scale[:, None] * codes + offset[:, None] - values[:, None])
    best = distance.argmin(1)
    tie = np.isclose(distance[np.arange(len(best)), best], distance[np.arange(len(best)), (best + 1) % 2**bits], rtol=0)
    best = np.where(tie & (best % 2 == 1) & (best + 1 < 2**bits), best + 1, best)
    return np.where(scale == 0, 0, best)


def naive_gptq(weight: np.ndarray, hessian: np.ndarray, bits: int, group: int, *, sym: bool, damp: float):
    """arXiv 2210.17323, equations 2 and 3, for every column in order -> codes, scale, offset."""
    w, h = weight.astype(np.float64), hessian.astype(np.float64)
    inverse = np.linalg.inv(h + damp * np.mean(np.diag(h)) * np.eye(len(h)))
    out, width = w.shape
    codes = np.zeros((out, width), np.int64)
    scale, offset = np.zeros((2, out, width // group))
    for i in range(width):
        g = i // group
        if i % group == 0:
            scale[:, g], offset[:, g] = min_max_grid(w[:, i : i + group], bits, sym=sym)
        codes[:, i] = nearest(w[:, i], scale[:, g], offset[:, g], bits)
        error = w[:, i] - (scale[:, g] * codes[:, i] + offset[:, g])
        w -= np.outer(error / inverse[i, i], inverse[i])  # every remaining weight compensates
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]  # column i leaves the problem
        inverse[i, i] = 1.0  # never read again
    return codes, scale, offset


def naive_sweep(weight, hessian, codes, scale, offset, bits: int, *, sym: bool):
    """One sweep of refine, row by row: dense least squares, descent one column at a time, least squares again."""
    codes, scale, offset = codes.copy(), scale.copy(), offset.copy()
    out, width = weight.shape
    size, middle = width // scale.shape[1], 2 ** (bits - 1)
    member = np.repeat(np.eye(scale.shape[1]), size, axis=0)  # (in, groups)
    expanded = member.T  # scale @ expanded: one number per column

    def error_of(row: int) -> np.ndarray:
        return (scale[row] @ expanded) * codes[row] + offset[row] @ expanded - weight[row]

    def solve(row: int) -> None:
        error = error_of(row)
        columns = (codes[row] - middle)[:, None] * member if sym else np.hstack([codes[row][:, None] * member, member])
        step = np.linalg.lstsq(columns.T @ hessian @ columns, columns.T @ hessian @ error, rcond=1e-12)[0]
        was = scale[row].copy(), offset[row].copy()
        scale[row] = (scale[row] - step[: len(scale[row])]).astype(np.float16)
        offset[row] = -middle * scale[row] if sym else (offset[row] - step[len(scale[row]) :]).astype(np.float16)
        now = error_of(row)
        if (scale[row] < 0).any() or now @ hessian @ now >= error @ hessian @ error:
            scale[row], offset[row] = was

    for row in range(out):
        solve(row)
        for i in range(width):
            error = error_of(row)
            wanted = weight[row, i] + error[i] - hessian[i] @ error / hessian[i, i]
            g = i // size
            codes[row, i] = nearest(np.array([wanted]), scale[row, g : g + 1], offset[row, g : g + 1], bits)[0]
        solve(row)
    return codes, scale, offset


def weighted_error(weight: np.ndarray, result: np.ndarray, hessian: np.ndarray) -> float:
    """tr(E H Eᵀ), E = Ŵ − W"""
    error = result.astype(np.float64) - weight
    return float(np.trace(error @ hessian @ error.T))
