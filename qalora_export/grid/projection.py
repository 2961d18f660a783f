"""`levels.project` for torch tensors on any device, bit for bit; what is returned are the products, not the levels.

Apart from the rest of grid/, which does without torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qalora_export.grid.named import SuperBlockGrid


def projected(values: Tensor, grid: SuperBlockGrid) -> Tensor:
    """step · level next to real numbers ≥ 0, float64 (out, in/g); negative ones become 0, infinite where fp16 ends."""
    blocks = values.unflatten(-1, (-1, grid.groups))
    return on_steps(blocks, half(blocks.amax(-1).clamp_min(0) / grid.top), grid)


def on_steps(blocks: Tensor, step: Tensor, grid: SuperBlockGrid) -> Tensor:
    """step · nearest level, ties to even, float64 (out, in/g); blocks (out, in/256, groups), step (out, in/256)."""
    wide = step[..., None]
    levels = (blocks / torch.where(wide > 0, wide, torch.inf)).round().clamp(0, grid.top)
    return (levels * wide).flatten(-2)


def half(values: Tensor) -> Tensor:
    """float64 that holds float16 numbers. Through float32, as torch rounds on every device."""
    return values.to(torch.float32).to(torch.float16).to(torch.float64)
