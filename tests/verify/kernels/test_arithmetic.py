"""Documented arithmetics against slow ones written from the C sources, value by value."""

from __future__ import annotations

import math

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st

from qalora_export.verify.kernels.arithmetic import (
    BF16,
    FLOAT16,
    FLOAT32,
    Int8Blocks,
    Int8Rows,
    Weight,
    cut_to_bfloat16,
    product,
)
from qalora_export.verify.kernels.ggml import Q8_0, Q8_1, Q8_K

F = np.float32


def inputs(features: int, seed: int = 0) -> np.ndarray:
    """Ordinary values, a block of zeros, halves that rounding must decide, and an outlier of 64 times the rest."""
    x = np.random.default_rng(seed).normal(0, 1, (5, features)).astype(F)
    x[1, :256] = 0
    x[2, :256] = np.resize(np.arange(-127, 128, dtype=F) / 2, 256)
    x[2, 0] = 127
    x[3, 17] *= 64
    return x


def slow_block(x: np.ndarray, factor: str, half: str) -> tuple[list[int], np.float32]:
    """(q, d) of one block, a value at a time, every step one float32 operation as in C."""
    largest = max(abs(value) for value in x)
    d = F(largest / F(127))
    multiplier = F(0) if largest == 0 else F(F(127) / largest) if factor == "127/max" else F(F(1) / d)
    q = []
    for value in x:
        scaled = F(value * multiplier)
        below = math.floor(abs(scaled))
        rest = abs(float(scaled)) - below
        up = rest > 0.5 or (rest == 0.5 and (half == "away" or below % 2 == 1))
        q.append(int(math.copysign(below + up, scaled)))
    return q, d


@pytest.mark.parametrize(
    "way", [*Q8_0, *Q8_1, Int8Blocks("mlas", 64, np.dtype(F), "127/max")], ids=lambda way: way.name
)
def test_int8_blocks_are_those_of_the_slow_way(way: Int8Blocks) -> None:
    x = inputs(512)
    seen = way.seen(x)
    for index, at in np.ndindex(len(x), x.shape[1] // way.block):
        part = slice(at * way.block, (at + 1) * way.block)
        q, d = slow_block(x[index, part], way.factor, way.half)
        step = float(np.float16(d)) if way.step == np.float16 else float(d)
        assert seen.values[index, part].tolist() == [step * code for code in q]
        if way.stores_sums:
            assert seen.sums is not None
            assert seen.sums[index, at] == float(np.float16(F(d * F(sum(q)))))


def test_int8_rows_are_those_of_the_slow_way() -> None:
    """kai_lhs_quant_pack_qai8dxp_f32.c, a row at a time, every step one float32 operation."""
    x = inputs(512)
    x[4] = np.abs(x[4])  # a row without a negative value begins at 0
    seen = Int8Rows("rows", 64).seen(x)
    for row, values, sums, sizes in zip(x, seen.values, seen.sums, seen.sizes, strict=True):
        least, largest = min(F(0), min(row)), max(F(0), max(row))
        scale = F(1) if least == largest else F(F(255) / F(largest - least))
        by_least, by_largest = F(F(-128) + F(least * scale)), F(F(127) + F(largest * scale))
        exact = F(F(-128) - F(least * scale)) if F(by_least + by_largest) > 0 else F(F(127) - F(largest * scale))
        zero = round(float(min(max(exact, F(-128)), F(127))))
        codes = [min(max(round(float(F(value * scale))) + zero, -128), 127) for value in row]
        assert values.tolist() == [(code - zero) * float(F(F(1) / scale)) for code in codes]
        assert sizes.tolist() == [(abs(code) + abs(zero)) * float(F(F(1) / scale)) for code in codes]
        assert np.allclose(sums, row.reshape(-1, 64).astype(np.float64).sum(1), rtol=1e-12)


def test_a_cut_takes_the_upper_half_of_the_bits() -> None:
    values = np.array([1.0, 1 + 2**-7, 1 + 2**-7 + 2**-8, -(1 + 2**-8 + 2**-9), 0.0, 2**-20], F)
    assert cut_to_bfloat16(values).tolist() == [1.0, 1 + 2**-7, 1 + 2**-7, -1.0, 0.0, 2**-20]


def test_the_portable_q8_0_is_that_of_the_gguf_package() -> None:
    x = inputs(512)
    kind = GGMLQuantizationType.Q8_0
    expected = dequantize(quantize(x, kind), kind).astype(np.float64)
    assert np.array_equal(Q8_0[2].seen(x).values, expected)


def test_q8_k_keeps_the_extreme_of_each_block_at_minus_127() -> None:
    x = inputs(512)
    values = Q8_K[0].seen(x).values
    for row, seen in zip(x, values, strict=True):
        for at in (0, 256):
            block = row[at : at + 256]
            extreme = block[np.abs(block).argmax()]
            if extreme == 0:
                assert not seen[at : at + 256].any()
                continue
            factor = F(F(-127) / extreme)
            d = float(F(F(1) / factor))
            assert seen[at : at + 256].tolist() == [d * min(127, round(float(F(factor * value)))) for value in block]


@pytest.mark.parametrize("way", [FLOAT32, FLOAT16, BF16], ids=lambda way: way.name)
def test_other_float_types_round_to_nearest_even(way: object) -> None:
    import torch

    x = inputs(256)
    kind = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[way.name]  # type: ignore[attr-defined]
    assert np.array_equal(way.seen(x).values, torch.from_numpy(x).to(kind).double().numpy())  # type: ignore[attr-defined]


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_a_product_is_its_sum_of_terms(seed: int, with_mins: bool) -> None:
    random = np.random.default_rng(seed)
    x = random.normal(0, 1, (3, 64)).astype(F)
    weight = Weight(random.normal(0, 1, (4, 64)), random.normal(0, 1, (4, 2)) if with_mins else None)
    seen = Q8_1[0].seen(x)
    y, size = product(seen, weight)
    assert seen.sums is not None
    for i, j in np.ndindex(3, 4):
        terms = [seen.values[i, k] * weight.scaled[j, k] for k in range(64)]
        if weight.mins is not None:
            terms += [seen.sums[i, b] * weight.mins[j, b] for b in range(2)]
        assert math.isclose(y[i, j], math.fsum(terms), abs_tol=1e-12)
        assert math.isclose(size[i, j], math.fsum(map(abs, terms)), rel_tol=1e-5)
