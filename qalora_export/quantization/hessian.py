"""The GPTQ Hessian of a linear layer, H = 2 Σ x xᵀ / n, collected while calibration text runs through it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Hessian:
    """Running sum of x xᵀ: products in float32, sum in float64, (in, in)."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self._count = 0

    def add(self, x: Tensor) -> None:
        """x (..., in)."""
        rows = x.reshape(-1, x.shape[-1]).float()
        self._sum += rows.T @ rows
        self._count += rows.shape[0]

    def value(self) -> Tensor:
        """2 / n · Σ x xᵀ; the factor 1/n cancels in GPTQ and keeps the numbers in range."""
        return self._sum * (2 / max(self._count, 1))


def collect(modules: dict[str, nn.Linear], run: Callable[[], None]) -> dict[str, Hessian]:
    """Hessians of all `modules` while `run` executes; modules that are fed the same tensor share one (q/k/v, gate/up).

    `modules` maps names to layers on a real device.
    """
    found: dict[str, Hessian] = {}
    latest: list[tuple[Tensor, str]] = []  # the input last seen and who saw it first

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            owner = latest[0][1] if latest and latest[0][0] is x else name
            if name not in found:
                found[name] = found[owner] if owner != name else Hessian(x.shape[-1], x.device)
            if owner == name:
                found[name].add(x)
                latest[:] = [(x, name)]

        return record

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found
