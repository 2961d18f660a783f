"""Each convention against a naive implementation of its own source."""

import pytest
import torch

from qalora_export.errors import InputError
from qalora_export.qalora.conventions import FACTORS, peft_alpha, resolve, sum_scaling


def branch(convention: str, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, pool: int) -> torch.Tensor:
    """B A pool(x) as each source writes it."""
    groups = x.shape[-1] // pool
    averaged = torch.nn.AvgPool1d(pool)(x)
    pooled = {"sum": averaged * pool, "mean": averaged, "peft": averaged * groups}[convention]
    return pooled @ a.T @ b.T


@pytest.mark.parametrize("convention", FACTORS)
@pytest.mark.parametrize(("in_features", "pool"), [(96, 32), (256, 128), (160, 32)])
def test_scaling_turns_a_sum_into_the_convention(convention: str, in_features: int, pool: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, a, b = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((5, in_features), (3, in_features // pool), (7, 3))
    )
    theirs = 1.7 * branch(convention, x, a, b, pool)
    ours = sum_scaling(convention, 1.7, in_features, pool) * branch("sum", x, a, b, pool)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_peft_alpha_inverts_the_peft_convention() -> None:
    alpha = peft_alpha(8.0, 4, 160, 32)
    assert sum_scaling("peft", alpha / 4, 160, 32) == pytest.approx(8.0, rel=1e-15)


RESOLVED = [  # choice, own, use_qalora, answer
    ("auto", True, True, "sum"),
    ("sum", True, True, "sum"),
    ("auto", False, True, "peft"),
    ("peft", False, True, "peft"),
    ("mean", False, False, "mean"),
    ("sum", False, False, "sum"),
    ("peft", False, False, "peft"),
]


@pytest.mark.parametrize(("choice", "own", "use_qalora", "answer"), RESOLVED)
def test_declared_or_named(choice: str, own: bool, use_qalora: bool, answer: str) -> None:
    assert resolve(choice, own=own, use_qalora=use_qalora, where="x") == answer


REFUSED = [
    ("auto", False, False, "does not say how it pools"),
    ("mean", True, True, "declares the convention 'sum'"),
    ("mean", False, True, "declares the convention 'peft'"),
    ("median", False, False, "unknown convention"),
]


@pytest.mark.parametrize(("choice", "own", "use_qalora", "reason"), REFUSED)
def test_never_guesses(choice: str, own: bool, use_qalora: bool, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        resolve(choice, own=own, use_qalora=use_qalora, where="x")
