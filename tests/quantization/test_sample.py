"""GPTQ against RTN on the trained sample base: what the quality script prints, on fewer windows and samples."""

from __future__ import annotations

import pytest
import torch

from samples.base import quality


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return quality.windows_of(8)


@pytest.fixture(scope="module")
def reference(windows: torch.Tensor) -> list[torch.Tensor]:
    return quality.logprobs(quality.MODEL, windows)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "sweeps"), [(2, 2), (3, 0), (4, 1), (8, 0)])
def test_gptq_is_closer_to_the_base_than_rtn(
    windows: torch.Tensor, reference: list[torch.Tensor], bits: int, sweeps: int
) -> None:
    """KL falls at every width; perplexity too, where the difference is larger than its own standard error."""
    row = quality.measure(windows, bits, 32, reference, calibration_samples=16, sweeps=sweeps)
    assert row["gptq_kl"] < 0.6 * row["rtn_kl"]
    if bits < 8:
        assert row["gptq_perplexity"] < row["rtn_perplexity"]
    else:
        # 8 bits cost either method 1e-4 nats: less than which text happened to be held out decides.
        assert abs(row["difference_nats"]) < 1e-3
