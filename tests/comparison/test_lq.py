"""LQ-LoRA's start: no worse than quantizing first and adding the rest afterwards; exact where rank allows."""

import torch

from qalora_export.comparison import lq
from qalora_export.quantization.rtn import round_to_nearest
from qalora_export.quantization.rules import Plan


def on_grid(weight: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(round_to_nearest(weight, Plan(2, 32, False), where="w").dequantize())


def matrix() -> torch.Tensor:
    return torch.randn(48, 64, generator=torch.Generator().manual_seed(0))


def test_turns_only_improve_on_the_first() -> None:
    weight = matrix()
    first, best = lq.split(weight, 4, on_grid, turns=1), lq.split(weight, 4, on_grid)
    assert best.turn > 0 and best.error < first.error
    rest = weight - on_grid(weight)
    u, s, vt = torch.linalg.svd(rest)
    assert abs(first.error - float((rest - (u[:, :4] * s[:4]) @ vt[:4]).norm() / weight.norm())) < 1e-5
    assert torch.equal(on_grid(best.quantized), best.quantized)
    assert abs(best.error - float((weight - best.quantized - best.b @ best.a).norm() / weight.norm())) < 1e-5


def test_a_full_rank_leaves_nothing() -> None:
    assert lq.split(matrix(), 48, on_grid).error < 1e-6


def test_importance_moves_the_error_to_what_matters_less() -> None:
    weight, rows = matrix(), torch.ones(48)
    rows[:8] = 30.0

    def error(split: lq.Split) -> float:
        return float((weight - split.quantized - split.b @ split.a)[:8].norm())

    assert error(lq.split(weight, 4, on_grid, rows=rows)) < 0.8 * error(lq.split(weight, 4, on_grid))
