"""One step of float16 beside base + adapter is a wrong number. Levels: tests/qalora/test_super_blocks.py."""

import numpy as np

from qalora_export.verify.reference.recomputed import Move, wrong_halves


def test_wrong_halves_counts_one_step_of_float16() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(16, 8)).astype(np.float16)
    a, b = rng.normal(size=(4, 4)).astype(np.float32), rng.normal(size=(16, 4)).astype(np.float32)
    right = (base + 0.5 * np.repeat(b.astype(np.float64) @ a, 2, axis=1)).astype(np.float16)
    move = Move.of(a, b, 0.5, 8)
    assert wrong_halves(base, right, move) == 0
    right[3, 5] = np.nextafter(right[3, 5], np.float16(9))
    assert wrong_halves(base, right, move) == 1
    right[2, 2] = np.nan
    assert wrong_halves(base, right, move) == 2
