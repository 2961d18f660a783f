"""Products whose float32 sums cancel: right ones are green, wrong ones are red, whatever the width and the outliers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qalora_export.verify.kernels.arithmetic import BACKWARD, Weight
from qalora_export.verify.kernels.mlas import INT8_LEVEL, UNSIGNED, ways_of
from qalora_export.verify.kernels.products import Product, deviation
from tests.verify.kernels.unsigned_bytes import Bytes, activations
from tests.verify.kernels.unsigned_bytes import product as kernel

SHAPES = [(64, 32, 67, False), (384, 32, 1, False), (384, 32, 67, True), (4096, 32, 20, True), (4096, 128, 20, False)]
OUT = 48


def documented(of: Bytes) -> Product:
    """The product as mlas.py reads it from a file."""
    out, blocks, block = of.codes.shape

    def rows(wanted: slice) -> Weight:
        scale = of.scale[wanted].astype(np.float64)
        scaled = of.codes[wanted] * scale[..., None]
        return Weight(scaled.reshape(len(scale), -1), -(of.zero[wanted] * scale))

    return Product("codes", "x", "y", (out, blocks * block), rows, ways_of(INT8_LEVEL, block, 8))


@pytest.mark.parametrize(("features", "block", "positions", "outlier"), SHAPES)
def test_right_products_are_green_and_wrong_ones_red(features: int, block: int, positions: int, outlier: bool) -> None:
    of = Bytes.random(OUT, features, block, seed=1)
    x = activations(positions, features, outlier=outlier, seed=2)
    y, right = kernel(x, of), documented(of)
    assert deviation(right, x, y).backward <= BACKWARD
    whole = deviation(right, x, y * np.float32(1.001))
    assert whole.backward > BACKWARD, whole
    if positions > 1:
        row = y.copy()
        row[:, 3] *= np.float32(1.001)
        assert deviation(right, x, row).row == 3
        assert deviation(right, x, row).backward > BACKWARD


@pytest.mark.parametrize(("features", "block", "positions", "outlier"), SHAPES[:3])
def test_one_code_that_the_kernel_read_wrong_is_red(features: int, block: int, positions: int, outlier: bool) -> None:
    of = Bytes.random(OUT, features, block, seed=1)
    x = activations(positions, features, outlier=outlier, seed=2)
    codes = of.codes.copy()
    at = np.unravel_index(np.abs(x).max(0).argmax(), codes.shape[1:])
    codes[5, *at] ^= 1
    wrong = deviation(documented(of), x, kernel(x, replace(of, codes=codes)))
    assert (wrong.row, wrong.backward > BACKWARD) == (5, True), wrong


def test_without_this_way_outliers_made_right_products_red() -> None:
    """Why it is there: the sums are ten times what is left of them."""
    of, x = Bytes.random(OUT, 384, 32, seed=1), activations(67, 384, outlier=True, seed=2)
    known = documented(of)
    others = replace(known, ways=tuple(way for way in known.ways if way.name != UNSIGNED.format(32)))
    assert len(others.ways) == len(known.ways) - 1
    assert deviation(others, x, kernel(x, of)).backward > BACKWARD
    assert deviation(known, x, kernel(x, of)).way == UNSIGNED.format(32)
