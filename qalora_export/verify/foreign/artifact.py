"""An artifact of any tool as tensors under Transformers names, in Transformers' order of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]
SLICE_VALUES = 4 << 20  # values of a tensor looked at together


@dataclass(frozen=True, slots=True)
class Tensor:
    """name: Transformers'. stored_as: its name in the artifact. kind: its type there ("Q4_K", "F16", "int4 g32").

    load: float32 of some rows, as the runtime's own dequantizer gives them. heads: the head count by which its rows
    are permuted in the artifact, or None. shift: what the artifact adds to every value (Gemma's norms).
    """

    name: str
    stored_as: str
    kind: str
    shape: tuple[int, ...]
    load: Callable[[slice], Rows]
    heads: int | None = None
    shift: float = 0.0

    def slices(self) -> Iterator[slice]:
        """Rows from the first to the last, SLICE_VALUES at a time."""
        width = self.shape[-1] if len(self.shape) > 1 else 1
        step = max(1, SLICE_VALUES // max(1, width))
        for begin in range(0, self.shape[0], step):
            yield slice(begin, min(begin + step, self.shape[0]))


@dataclass(frozen=True)
class Foreign:
    """tensors: by Transformers name. extra: names that the model does not have. metadata: what steers the runtime.

    absent: modules' tensors that the architecture needs and the artifact lacks.
    """

    path: Path
    tensors: dict[str, Tensor]
    extra: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
