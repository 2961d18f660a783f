"""The Triton kernels against their torch oracles: on a GPU where there is one, else in Triton's interpreter."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from qalora_export.grid import BITS, GROUP_SIZES, GroupAffine
from qalora_export.qalora.dequant import dequantize_torch
from qalora_export.qalora.function import effective_offset, group_sum
from qalora_export.qalora.kernels import ops
from tests.qalora.layers import random_matrix
from tests.qalora.test_dequant import as_torch, matrices

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = {4: torch.int32, 2: torch.int16}


def differing_bits(left: Tensor, right: Tensor) -> int:
    """Elements whose bits differ; -0 and 0 differ."""
    assert (left.dtype, left.shape) == (right.dtype, right.shape)
    as_integer = INTEGERS[left.dtype.itemsize]
    return int((left.cpu().view(as_integer) != right.cpu().view(as_integer)).sum())


def on_device(matrix: GroupAffine) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale, offset = as_torch(matrix)
    return codes.to(DEVICE), scale.to(DEVICE), offset.to(DEVICE)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUP_SIZES)
def test_dequantize_equals_torch_bit_for_bit(bits: int, group: int) -> None:
    """37 × 3 groups fill no whole number of programs (or less than one)."""
    packed, scale, offset = on_device(random_matrix(37, 3 * group, bits=bits, group=group))
    for dtype in DTYPES:
        expected = dequantize_torch(packed, scale, offset, bits, dtype)
        assert differing_bits(ops.dequantize(packed, scale, offset, bits, dtype), expected) == 0
    expected = dequantize_torch(packed, scale, offset, bits, torch.float64)
    assert torch.equal(ops.dequantize(packed, scale, offset.float(), bits, torch.float64), expected)


@settings(max_examples=40, deadline=None)
@given(matrices())
def test_dequantize_equals_torch_for_any_finite_scale_and_offset(matrix: GroupAffine) -> None:
    """Subnormal, largest, negative, ±0: the float32 matrix is the canonical form's, the narrow ones one rounding on."""
    parts = on_device(matrix)
    found = ops.dequantize(*parts, matrix.bits, torch.float32)
    assert differing_bits(found, torch.from_numpy(matrix.dequantize())) == 0
    for dtype in DTYPES[1:]:
        assert differing_bits(ops.dequantize(*parts, matrix.bits, dtype), found.to(dtype)) == 0


@pytest.mark.parametrize("bits", BITS)
def test_codes_in_a_view_that_begins_between_words(bits: int) -> None:
    packed, scale, offset = on_device(random_matrix(5, 32, bits=bits))
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8, device=DEVICE), packed.view(-1)])[1:].view(packed.shape)
    expected = dequantize_torch(packed, scale, offset, bits, torch.float32)
    assert differing_bits(ops.dequantize(shifted, scale, offset, bits, torch.float32), expected) == 0


@pytest.mark.parametrize(
    ("rows", "pools", "repeat", "rank", "scaling"),
    [
        (5, 3, 1, 1, 2.0),
        (70, 37, 1, 16, 1 / 3),
        (33, 5, 4, 8, 0.1),
        (32, 32, 3, 64, 1.7),
    ],
)
def test_effective_offset_equals_torch(rows: int, pools: int, repeat: int, rank: int, scaling: float) -> None:
    """Scalings that float32 does not hold, too."""
    generator = torch.Generator().manual_seed(rows)
    offset = torch.randn(rows, pools * repeat, generator=generator).half().to(DEVICE)
    a, b = (torch.randn(shape, generator=generator).mul(0.3).to(DEVICE) for shape in ((rank, pools), (rows, rank)))
    expected = effective_offset(offset, a, b, scaling)
    assert differing_bits(ops.effective_offset(offset, a, b, scaling), expected) == 0
    expected = effective_offset(offset, a.double(), b.double(), scaling)
    assert differing_bits(ops.effective_offset(offset, a.double(), b.double(), scaling), expected) == 0


@pytest.mark.parametrize(
    ("bits", "group", "repeat", "rank", "scaling"),
    [
        (4, 32, 1, 16, 2.0),
        (3, 32, 2, 5, 1 / 3),
        (2, 64, 1, 1, 0.1),
        (8, 128, 3, 20, 1.7),
    ],
)
def test_dequantize_with_an_adapter_equals_torch(bits: int, group: int, repeat: int, rank: int, scaling: float) -> None:
    """The low-rank product, its rounding to float16 and the matrix in one kernel; 37 × 6 groups fill no program."""
    packed, scale, offset = on_device(random_matrix(37, 6 * group, bits=bits, group=group))
    generator = torch.Generator().manual_seed(bits)
    a, b = (torch.randn(shape, generator=generator).mul(0.3).to(DEVICE) for shape in ((rank, 6 // repeat), (37, rank)))
    moved = effective_offset(offset, a, b, scaling)
    assert differing_bits(moved, offset) > 0.9 * offset.numel()
    for dtype in DTYPES:
        expected = dequantize_torch(packed, scale, moved, bits, dtype)
        assert differing_bits(ops.dequantize(packed, scale, offset, bits, dtype, a, b, scaling), expected) == 0


def test_a_kernel_is_not_differentiated_by_mistake() -> None:
    packed, scale, offset = on_device(random_matrix(8, 64))
    a, b = torch.randn(4, 2, device=DEVICE, requires_grad=True), torch.randn(8, 4, device=DEVICE)
    with pytest.raises(RuntimeError, match="dequantize has no gradient"):
        ops.dequantize(packed, scale, offset, 4, torch.float32, a, b, 0.5)
    with torch.no_grad():
        ops.dequantize(packed, scale, offset, 4, torch.float32, a, b, 0.5)


def test_effective_offset_of_a_new_adapter_is_the_offset() -> None:
    offset = torch.tensor([[6.0e-8, -65504.0, 0.0, -0.5]], dtype=torch.float16, device=DEVICE)
    a, b = torch.randn(8, 4, device=DEVICE), torch.zeros(1, 8, device=DEVICE)
    assert torch.equal(ops.effective_offset(offset, a, b, 2.0), offset)


@pytest.mark.parametrize(("groups", "pool"), [(3, 32), (1, 16), (5, 48), (2, 640)])
def test_group_sum_equals_torch_where_sums_are_exact(groups: int, pool: int) -> None:
    x = torch.randint(-2, 3, (2, 7, groups * pool), device=DEVICE)
    for dtype in DTYPES:
        found = ops.group_sum(x.to(dtype), groups, torch.float32)
        assert differing_bits(found, group_sum(x.float(), groups)) == 0


def test_group_sum_rounds_its_float32_sum_once() -> None:
    x = torch.randn(300, 96, device=DEVICE)
    for dtype in DTYPES:
        wide = ops.group_sum(x.to(dtype), 3, torch.float32)
        exact = x.to(dtype).double().unflatten(-1, (3, -1)).sum(-1)
        torch.testing.assert_close(wide.double(), exact, rtol=1e-5, atol=1e-5)
        assert differing_bits(ops.group_sum(x.to(dtype), 3, dtype), wide.to(dtype)) == 0
    assert ops.group_sum(x[:0], 3, torch.float32).shape == (0, 3)


@pytest.mark.parametrize("bits", BITS)
def test_fused_linear_equals_torch_where_sums_are_exact(bits: int) -> None:
    """Small integers: every order of summation gives the same number, so equality is exact. No size fills its tiles."""
    rng = np.random.default_rng(bits)
    out, columns, group = 70, 192, 32
    shape = (out, columns // group)
    scale, offset = (rng.integers(-2, 3, shape).astype(np.float16) for _ in range(2))
    codes = rng.integers(0, min(2**bits, 16), (out, columns)).astype(np.uint8)
    parts = on_device(GroupAffine(codes, scale, offset, bits))
    x = torch.from_numpy(rng.integers(-1, 2, (2, 9, columns))).to(DEVICE)
    for dtype in DTYPES:
        found = ops.fused_linear(x.to(dtype), *parts, bits)
        exact = x.double() @ dequantize_torch(*parts, bits, torch.float64).T
        assert torch.equal(found, exact.to(torch.float32).to(dtype))


@pytest.mark.parametrize("group", GROUP_SIZES)
def test_fused_linear_multiplies_by_the_rounded_matrix(group: int) -> None:
    parts = on_device(random_matrix(20, 2 * group, group=group))
    x = torch.randn(3, 2 * group, device=DEVICE)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)):
        exact = x.to(dtype).double() @ dequantize_torch(*parts, 4, dtype).double().T
        error = ops.fused_linear(x.to(dtype), *parts, 4).double() - exact
        assert error.norm() <= tolerance * exact.norm()
    assert ops.fused_linear(x[:0], *parts, 4).shape == (0, 20)


def test_ops_tell_the_compiler_the_truth_about_themselves() -> None:
    packed, scale, offset = on_device(random_matrix(8, 64))
    a, b, x = torch.randn(4, 2, device=DEVICE), torch.randn(8, 4, device=DEVICE), torch.randn(3, 64, device=DEVICE)
    checks = ("test_schema", "test_faketensor")
    plain, adapted = (None, None, 0.0), (a, b, 0.5)
    torch.library.opcheck(ops.dequantize_op, (packed, scale, offset, 4, torch.bfloat16, *plain), test_utils=checks)
    torch.library.opcheck(ops.dequantize_op, (packed, scale, offset, 4, torch.bfloat16, *adapted), test_utils=checks)
    torch.library.opcheck(ops.effective_offset_op, (offset, a, b, 0.5), test_utils=checks)
    torch.library.opcheck(ops.group_sum_op, (x, 2, torch.float32), test_utils=checks)
    torch.library.opcheck(ops.fused_linear_op, (x, packed, scale, offset, 4), test_utils=checks)
