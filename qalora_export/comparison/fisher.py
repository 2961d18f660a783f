"""Fisher information of every weight, told by row and by column (arXiv 2311.12023, §3.3).

    F = mean over samples of (∂loss/∂W)²        rows = √(mean over columns of F)     columns = √(mean over rows of F)

Scaled to mean 1, and never below a tenth of it, so that no row is given up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qalora_export.data.sequence_packing import Row, collate

LEAST = 0.1


def squared_gradients(model: Any, modules: Sequence[str], rows: Iterable[Row]) -> dict[str, Tensor]:
    """Module -> sum over `rows` of (∂loss/∂W)², float32 (out, in), of a float32 model; one backward pass per row."""
    weights = {name: model.get_submodule(name).weight for name in modules}
    for weight in weights.values():
        weight.requires_grad_(True)
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for row in rows:
        model(**collate([row])).loss.backward()
        for name, weight in weights.items():
            total[name] += weight.grad.square()
            weight.grad = None
    for weight in weights.values():
        weight.requires_grad_(False)
    return {name: squares.detach() for name, squares in total.items()}


def importance(squared: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> (rows (out,), columns (in,)), float32, of squared_gradients."""
    return {name: (_scaled(squares.mean(1)), _scaled(squares.mean(0))) for name, squares in squared.items()}


def _scaled(squares: Tensor) -> Tensor:
    root = squares.sqrt()
    mean = root.mean()
    return (root / mean).clamp_min(LEAST) if mean > 0 else torch.ones_like(root)
