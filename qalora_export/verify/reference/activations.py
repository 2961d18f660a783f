"""What the PyTorch reference holds at chosen points, for the bisect: the float32 model of verify.reference, hooked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.verify.bisect.points import Point
from qalora_export.verify.bisect.search import Activations
from qalora_export.verify.reference.logits import fixed_threads, float32_model, round_to_int8


class ReferenceModel:
    """The checkpoint in float32, loaded once. int8 rounds the input of every quantized layer, as int8 kernels do."""

    def __init__(self, checkpoint: Path, *, threads: int) -> None:
        self._threads = threads
        self._model = float32_model(checkpoint)
        self._modules = CanonicalCheckpoint(checkpoint).modules

    def activations(self, ids: NDArray[np.int32], points: list[Point], *, int8: bool = False) -> Activations:
        """Point key -> float32 (positions, features) for one sequence run as a whole prompt."""
        found: Activations = {}
        handles = [self._watch(point, found) for point in points]
        if int8:
            handles += [self._round_input(name, group_size) for name, (_, group_size) in self._modules.items()]
        try:
            with fixed_threads(self._threads), torch.inference_mode():
                self._model(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _round_input(self, name: str, group_size: int) -> Any:
        module = self._model.get_submodule(name)
        return module.register_forward_pre_hook(lambda _, x: (round_to_int8(x[0], group_size),))

    def _watch(self, point: Point, found: Activations) -> Any:
        module = self._model.get_submodule(point.module)
        if point.side == "input":
            return module.register_forward_pre_hook(lambda _, x: _keep(found, point.key, x[0]))
        after: Callable[..., None] = lambda _, x, y: _keep(found, point.key, y if isinstance(y, torch.Tensor) else y[0])  # noqa: E731, ARG005
        return module.register_forward_hook(after)


def _keep(found: Activations, key: str, value: torch.Tensor) -> None:
    """(1, positions, features) -> float32 (positions, features)."""
    found[key] = value[0].float().flatten(1).numpy().copy()
