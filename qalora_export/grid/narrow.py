"""The one place where a number may lose precision: it counts what changed."""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import InputError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, slots=True)
class Narrowed:
    """values in the target dtype; changed: how many differ from the source as numbers; total: how many there are."""

    values: NDArray[Any]
    changed: int
    total: int


def narrow(source: NDArray[Any], dtype: np.dtype | type, *, where: str) -> Narrowed:
    """Cast to `dtype` with round-to-nearest-even and count the values that changed.

    Raises InputError when the source holds NaN or infinity, or a finite value overflows the target: neither is a
    rounding. `where` names the tensor in the message.
    """
    if not np.isfinite(source).all():
        raise InputError("a weight is NaN or infinite", where=where, fix="repair or retrain the model")
    with np.errstate(over="ignore"):
        values = source.astype(dtype)
    if not np.isfinite(values).all():
        raise InputError(
            f"a value of magnitude {float(np.abs(source).max()):.6g} overflows {np.dtype(dtype).name}",
            where=where,
            fix="choose a wider dtype or a smaller group size",
        )
    changed = int(np.count_nonzero(values.astype(np.float64) != source.astype(np.float64)))
    return Narrowed(values, changed, int(source.size))
