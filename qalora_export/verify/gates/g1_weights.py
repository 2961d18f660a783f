"""Gate G1: every matrix as the runtime's own dequantizer gives it, against s·q + m in float32."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.verify.gates.registry import measures
from qalora_export.verify.rule import Entry, Gate, Limit
from qalora_export.verify.target import Target

SHOWN = 12

GATE = Gate(
    id="G1",
    title="weights",
    what="every matrix dequantized by the runtime's own dequantizer",
    row="weights, largest ulp",
    limits=(
        Limit("ulp_max", 0, "ulp", "s·q is exact in float32, so there is one rounding and one right answer"),
        Limit("missing_matrices", 0, "matrices", "a matrix that was not dequantized was not checked"),
    ),
)


@measures(GATE)
def weights(target: Target) -> Entry:
    """Once for all runtimes that dequantize an artifact by the same dequantizer."""
    runtime, known = target.runtime, target.session.dequantized
    key = (runtime.dequantizer, target.artifact)
    if key not in known:
        matrices = runtime.dequantized(target.artifact, target.workdir / "weights")
        known[key] = weights_entry(target.name, target.session.checkpoint, matrices, by=runtime.dequantizer)
    return replace(known[key], runtime=target.name)


def weights_entry(
    runtime: str, checkpoint: CanonicalCheckpoint, dequantized: Iterable[tuple[str, NDArray[np.float32]]], *, by: str
) -> Entry:
    """Each (module, float32 (out, in)) against the checkpoint's own s·q + m. by: which dequantizer."""
    worst, where, seen = 0.0, list[str](), set[str]()
    for module, matrix in dequantized:
        if module not in checkpoint.modules:
            continue  # a surplus matrix is gate G0's finding
        seen.add(module)
        ulp, count = ulp_distance(checkpoint.group_affine(module).dequantize(), matrix)
        worst = max(worst, ulp)
        if count:
            where.append(f"{module}: {count} weights, up to {ulp:.0f} ulp")
    missing = sorted(set(checkpoint.modules) - seen)
    where += [f"{module}: not dequantized" for module in missing]
    return GATE.judge(
        runtime,
        {"ulp_max": worst, "missing_matrices": len(missing)},
        detail=f"{len(seen)} of {len(checkpoint.modules)} matrices by {by}",
        where=where[:SHOWN],
        figures={"matrices": len(seen), "dequantizer": by},
    )


def ulp_distance(want: NDArray[np.float32], got: NDArray[np.float32]) -> tuple[float, int]:
    """(largest distance in units of the last place, count of values that differ); infinite for NaN or other shapes."""
    if want.shape != got.shape or got.dtype != np.float32:
        return float("inf"), max(want.size, got.size)
    if np.array_equal(_bits(want), _bits(got)) and not np.isnan(want).any():  # as nearly always, and quickly seen
        return 0.0, 0
    distance = np.abs(_ordered(want) - _ordered(got))
    nan = np.isnan(want) | np.isnan(got)
    count = int(np.count_nonzero((distance > 0) | nan))
    return (float("inf") if nan.any() else float(distance.max(initial=0))), count


def _ordered(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """float32 bit patterns as integers in numeric order; -0 and +0 are the same integer."""
    bits = _bits(values).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _bits(values: NDArray[np.float32]) -> NDArray[np.int32]:
    return np.ascontiguousarray(values).view(np.int32)
