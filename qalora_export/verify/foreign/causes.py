"""What is wrong with a wrong tensor, found by trying: what makes it right again is what it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.formats.gguf.permute import hf_order, row_order
from qalora_export.verify.foreign.artifact import Tensor
from qalora_export.verify.foreign.fit import LEAST_COSINE, Fit, fit, source_of

SAMPLED = 64  # rows by which a tensor is looked for among the others
STALE_COSINE = 0.9


def cause_of(
    tensor: Tensor, source: NDArray[Any], near: Fit | None, folder: ModelFolder, heads: Mapping[str, int]
) -> str:
    """One phrase. near: how the tensor fits the source as it is, None where the shapes differ."""
    if near is None:
        return _other_shape(tensor, source, folder)
    if not np.isfinite(near.error):
        return "holds NaN or infinite values"
    if (said := _shifted(tensor, source)) is not None:
        return said
    for said, order in _orders(tensor, heads):
        if _reordered(tensor, source, order).like:
            return said
    if len(set(tensor.shape)) == 1 and len(tensor.shape) == 2 and _is_transposed(tensor, source):
        return "transposed"
    if near.like or near.cosine >= STALE_COSINE or near.in_few_blocks:
        return _nearly(tensor, source, near)
    if (other := _whose(tensor, folder)) is not None:
        return f"holds the numbers of {other}"
    if near.cosine >= LEAST_COSINE:
        return f"of another version of the model (cosine {near.cosine:.3f}, error {_percent(near.error)})"
    return (
        f"holds the numbers of no tensor of this model (cosine {near.cosine:.3f}): stale, of another checkpoint, or "
        "damaged"
    )


def _nearly(tensor: Tensor, source: NDArray[Any], near: Fit) -> str:
    """Right but for a factor, a shift, some blocks, or an older state."""
    if near.scaled and fit(tensor, source, lambda rows: near.scale * tensor.load(rows)).like:
        return f"multiplied by {1 / near.scale:.6g}"
    if near.worst > 1 and near.few_blocks:
        row, column = near.at
        return (
            f"{near.blocks} of {near.total_blocks} blocks damaged, worst in row {row} from column {column}, whose "
            f"error is {near.worst:.3g} times what right blocks of this tensor reach"
        )
    return (
        f"of another version of the model, or quantized by a broken tool: error {_percent(near.error)}, "
        f"{near.ratio:.3g} times (squared) what {tensor.kind} holds"
    )


def _shifted(tensor: Tensor, source: NDArray[Any]) -> str | None:
    """Norms that multiply by 1 + w are stored as that, in families that have them (Gemma)."""
    if not tensor.name.endswith("norm.weight"):
        return None
    if tensor.shift and fit(replace(tensor, shift=0.0), source).like:
        return f"lacks the {tensor.shift:g} that norms of this architecture need in the file"
    if not tensor.shift and fit(tensor, source, lambda rows: tensor.load(rows) - 1).like:
        return "has 1 added, as only norms that multiply by 1 + w need it"
    return None


def _orders(tensor: Tensor, heads: Mapping[str, int]) -> Iterator[tuple[str, NDArray[np.intp]]]:
    """Orders in which rows may have been left; of a tensor as it was loaded, in Transformers' order if it is right."""
    count = heads.get(tensor.name.rpartition(".")[0].rpartition(".")[2])
    rows = tensor.shape[0]
    if count is None or rows % (2 * count):
        return
    if tensor.heads is not None:  # loading undid a permutation that was never made, or was made twice
        yield "rows are not permuted for RoPE, as this architecture needs in GGUF", row_order(rows, count)
        yield "rows are permuted for RoPE twice", hf_order(rows, count)
    else:
        yield "rows are permuted for RoPE, which this architecture does not need", hf_order(rows, count)
        yield "rows are permuted backwards for RoPE", row_order(rows, count)
    for other in {*heads.values()} - {count}:
        if rows % (2 * other) == 0 and tensor.heads is not None:
            undone = row_order(rows, count)
            yield f"rows are permuted for {other} heads, not {count}", undone[hf_order(rows, other)]


def _is_transposed(tensor: Tensor, source: NDArray[Any]) -> bool:
    """Square, so that its shape does not tell; transposed before or behind the permutation for RoPE, if it has one."""
    loaded = tensor.load(slice(0, tensor.shape[0]))
    tries = [loaded.T]
    if tensor.heads is not None:
        stored = loaded[row_order(len(loaded), tensor.heads)].T
        tries += [stored, stored[hf_order(len(loaded), tensor.heads)]]
    return any(fit(tensor, source, lambda rows, whole=whole: whole[rows]).like for whole in tries)


def _reordered(tensor: Tensor, source: NDArray[Any], order: NDArray[np.intp]) -> Fit:
    whole = tensor.load(slice(0, tensor.shape[0]))[order]
    return fit(tensor, source, lambda rows: whole[rows])


def _other_shape(tensor: Tensor, source: NDArray[Any], folder: ModelFolder) -> str:
    what = f"has shape {tensor.shape}, the model's is {tuple(source.shape)}"
    if len(tensor.shape) == 2 and tensor.shape == tuple(source.shape)[::-1]:
        return f"transposed: {what}"
    other = _whose(tensor, folder)
    return what if other is None else f"{what}; holds the numbers of {other}"


def _whose(tensor: Tensor, folder: ModelFolder) -> str | None:
    """The tensor of the source that it holds, by some rows and then by all."""
    sample = slice(0, min(SAMPLED, tensor.shape[0]))
    mine = tensor.load(sample).astype(np.float64).ravel()
    best, cosine = None, LEAST_COSINE
    for name in folder.names():
        if tuple(folder.entry(name).shape) != tuple(tensor.shape) or name == tensor.name:
            continue
        theirs = np.asarray(folder.tensor(name)[sample]).astype(np.float64).ravel() + tensor.shift
        norm = float(np.linalg.norm(mine) * np.linalg.norm(theirs))
        if norm > 0 and float(mine @ theirs) / norm > cosine:
            best, cosine = name, float(mine @ theirs) / norm
    if best is None:
        return None
    source = source_of(folder, best)
    return best if source is not None and fit(tensor, source).like else None


def _percent(error: float) -> str:
    return f"{100 * error:.3g} %"
