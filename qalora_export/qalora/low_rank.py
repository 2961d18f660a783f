"""The update that an adapter makes, scaling · B A, as every formula of the layer has it."""

from __future__ import annotations

from torch import Tensor


def update(a: Tensor, b: Tensor, scaling: float, groups: int) -> Tensor:
    """scaling · B A, float64 (out, groups): a (r, in/pool), b (out, r), a column for each group that a pool covers.

    In float64, for the reasons of function.effective_offset.
    """
    delta: Tensor = scaling * (b.double() @ a.double())  # (out, in/pool)
    repeat = groups // a.shape[1]
    return delta if repeat == 1 else delta.repeat_interleave(repeat, dim=1)
