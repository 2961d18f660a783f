"""Each observation point by itself: the reference goes on from the runtime's own values, so no error travels.

At every point the reference, having computed its value, takes the runtime's in its place. What it computes at the next
point then comes from what the runtime really had there: an error is where it arises and nowhere behind, and a large
residual stream or a layer that amplifies cannot move it.

Float32 rounding has a yardstick at every point: the same step from values that are off by up to one unit in the last
place, at random (as reference.logits.rounding_noise does for the whole model).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qalora_export.verify.bisect.points import Point, Shown, value_of
from qalora_export.verify.reference.local_proof import position_nmse
from qalora_export.verify.reference.logits import fixed_threads, ulps

# Right exports of SmolLM2-135M in llama.cpp and ONNX Runtime: at most 3e-12 and 20 times the noise, except products of
# many terms one of which is large: each further term then costs half a unit in the last place of the running sum, which
# no noise of the input shows (5.7e-12 at most behind 1,536 terms, K · 2⁻⁴⁸ = 5.5e-12).
TIMES_NOISE, ROUNDING, BETWEEN_PRODUCTS = 1000.0, 1e-13, 1e-11
TIMES_SUM, HALF_ULP = 4.0, 2.0**-24
DRAWS = 4  # of one step alone: TIMES_NOISE is far beyond what a mean of four may miss


@dataclass(frozen=True, slots=True)
class PointError:
    """At the worst position of a point: nmse of the runtime's value, and what is allowed there."""

    nmse: float
    allowed: float

    @property
    def excess(self) -> float:
        return self.nmse / self.allowed


@dataclass
class _Forced:
    """Compares and replaces at every point. Rows of a batch: the undisturbed one, then DRAWS disturbed ones."""

    shown: Shown
    disturb: Callable[[Tensor], Tensor]
    found: dict[str, PointError] = field(default_factory=dict)

    def meet(self, point: Point, value: Tensor, linear: nn.Linear | None = None) -> Tensor | None:
        """value (1 + DRAWS, …) as the reference has it; what to go on with, None for the same.

        linear: the layer whose output it is.
        """
        rows = value.transpose(1, 2) if point.heads_first else value
        want = rows.float().flatten(2).numpy()  # (1 + DRAWS, positions, features)
        got = self.shown.get(point.key)
        if got is None:
            return None
        noise = np.mean([position_nmse(disturbed, want[0]) for disturbed in want[1:]], axis=0)
        error = position_nmse(got, want[0])
        least = BETWEEN_PRODUCTS if linear is None else np.maximum(ROUNDING, TIMES_SUM * _sum_rounding(linear, want[0]))
        allowed = np.maximum(least, TIMES_NOISE * np.where(np.isfinite(noise), noise, 0))
        worst = int(np.argmax(error / allowed))
        self.found[point.key] = PointError(float(error[worst]), float(allowed[worst]))
        if got.shape != want[0].shape or not point.module:  # behind the whole model nothing comes
            return None
        taken: Tensor = (
            torch.from_numpy(np.ascontiguousarray(got)).unflatten(1, rows.shape[2:]).expand(rows.shape).clone()
        )
        taken[1:] = self.disturb(taken[1:])
        return taken.transpose(1, 2) if point.heads_first else taken


def _sum_rounding(linear: nn.Linear, y: NDArray[np.float32]) -> NDArray[np.float64]:
    """NMSE of y (positions, out) when each of a row's K terms costs half a unit in the last place of their sum, at
    random; the bias, which may be most of y, is no such term.
    """
    bias = 0.0 if linear.bias is None else linear.bias.detach().numpy().astype(np.float64)
    whole = (y.astype(np.float64) ** 2).sum(axis=1)
    summed = ((y - bias) ** 2).sum(axis=1)
    share = np.divide(summed, whole, out=np.ones_like(whole), where=whole > 0)
    return np.asarray(linear.in_features * HALF_ULP**2 * share)


def point_errors(
    model: nn.Module,
    ids: NDArray[np.int32],
    points: list[Point],
    shown: Shown,
    threads: int,
) -> dict[str, PointError]:
    """Point key -> its error, for one sequence as a whole prompt. shown: the runtime's (positions, features) by key.

    A point that the runtime does not show has no error of its own, and its reference goes on with what it has.
    """
    forced = _Forced(shown, ulps(0))
    handles = [_hook(model, point, forced) for point in points]
    try:
        with fixed_threads(threads), torch.inference_mode():
            model(torch.from_numpy(ids.astype(np.int64)).expand(1 + DRAWS, -1), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return forced.found


def _hook(model: nn.Module, point: Point, forced: _Forced) -> torch.utils.hooks.RemovableHandle:
    module = model.get_submodule(point.module)

    def entering(_: nn.Module, x: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        taken = forced.meet(point, x[0])
        return None if taken is None else (taken, *x[1:])

    def leaving(_: nn.Module, __: object, y: object) -> object:
        taken = forced.meet(point, value_of(y), module if isinstance(module, nn.Linear) else None)
        return (taken, *y[1:]) if taken is not None and isinstance(y, tuple) else taken

    if point.side == "input":
        return module.register_forward_pre_hook(entering)
    return module.register_forward_hook(leaving)
