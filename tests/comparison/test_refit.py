"""Offsets in closed form: the least error that offsets can have, nothing else moves, no row gets worse."""

import numpy as np
import torch

from qalora_export.comparison.refit import refitted
from qalora_export.quantization.gptq import damped_hessian
from qalora_export.quantization.refine import output_error
from qalora_export.quantization.rtn import round_to_nearest
from qalora_export.quantization.rules import Plan


def test_it_is_the_least_error_that_offsets_can_have() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, mixing = torch.randn(16, 96, generator=draw), torch.randn(96, 96, generator=draw)
    x = torch.randn(500, 96, generator=draw) @ mixing + 0.5
    hessian = damped_hessian(x.double().T @ x.double(), 1e-3)
    before = round_to_nearest(weight, Plan(2, 32, False), where="w")
    after = refitted(before, weight, hessian)
    np.testing.assert_array_equal(after.codes, before.codes)
    np.testing.assert_array_equal(after.scale, before.scale)
    target = weight.double()

    def error(values: torch.Tensor) -> torch.Tensor:
        return output_error(values - target, hessian)

    was, now = (error(torch.from_numpy(matrix.dequantize()).double()) for matrix in (before, after))
    assert (now < was).all()
    # An oracle that knows no normal equations: least squares on H = Lᵀ L.
    factor = torch.linalg.cholesky(hessian).T
    spread = torch.eye(3).repeat_interleave(32, 0).double()  # offset of a group -> its columns
    rest = target - torch.from_numpy(before.dequantize()).double()
    step = torch.linalg.lstsq(factor @ spread, factor @ rest.T).solution
    least = error(torch.from_numpy(before.dequantize()).double() + (spread @ step).T)
    torch.testing.assert_close(now, least, rtol=1e-3, atol=0)
