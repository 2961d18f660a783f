"""metrics.compare against loops that follow the definitions word by word."""

import math

import numpy as np
import pytest

from qalora_export.verify import metrics
from qalora_export.verify.metrics import FLOOR, ORDINARY, TIE_MARGIN, following_ids, perplexity, position_metrics


def logprobs(rows: int, vocabulary: int, *, seed: int, spread: float = 3.0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(0, spread, (rows, vocabulary))
    return (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)


def naive(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """NMSE of centred rows and KL(a‖b), one value at a time."""
    a = [max(float(x), FLOOR) for x in a]
    b = [max(float(x), FLOOR) for x in b]
    a = [x - math.log(math.fsum(math.exp(y) for y in a)) for x in a]
    b = [x - math.log(math.fsum(math.exp(y) for y in b)) for x in b]
    mean_a, mean_b = math.fsum(a) / len(a), math.fsum(b) / len(b)
    error = math.fsum(((y - mean_b) - (x - mean_a)) ** 2 for x, y in zip(a, b, strict=True))
    power = math.fsum((x - mean_a) ** 2 for x in a)
    return error / power, math.fsum(math.exp(x) * (x - y) for x, y in zip(a, b, strict=True))


def end_of_sequence(rows: int) -> np.ndarray:
    return np.full(rows, -1, np.int32)


@pytest.mark.parametrize("noise", [1e-4, 0.1, 3.0])
def test_nmse_and_kl_equal_naive_loops(noise: float) -> None:
    a = logprobs(7, 50, seed=1)
    b = (a + np.random.default_rng(2).normal(0, noise, a.shape)).astype(np.float32)
    found = position_metrics(a, b, end_of_sequence(7))
    for row in range(7):
        nmse, kl = naive(a[row], b[row])
        assert found.nmse[row] == pytest.approx(nmse, rel=1e-9)
        assert found.kl[row] == pytest.approx(kl, rel=1e-6, abs=1e-15)


def test_a_constant_per_row_is_no_difference() -> None:
    """Logits and log-softmax are the same distribution."""
    a = logprobs(5, 40, seed=3)
    found = position_metrics(a, a + np.float32(2.0), end_of_sequence(5))
    assert found.nmse.max() < 1e-12
    assert found.kl.max() < 1e-12
    assert found.agree.all()


def test_identical_is_zero_and_swapped_rows_are_not() -> None:
    a = logprobs(6, 64, seed=4)
    assert position_metrics(a, a, end_of_sequence(6)).summary().nmse_max == 0.0
    swapped = position_metrics(a, a[[1, 0, 2, 3, 4, 5]], end_of_sequence(6))
    assert (swapped.nmse[:2] > 0.5).all()
    assert (swapped.nmse[2:] == 0).all()


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = logprobs(23, 31, seed=5), logprobs(23, 31, seed=6)
    whole = position_metrics(a, b, end_of_sequence(23))
    monkeypatch.setattr(metrics, "BLOCK_VALUES", 31 * 4)
    blocks = position_metrics(a, b, end_of_sequence(23))
    for name in ("nmse", "kl", "agree", "tie", "bad"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(blocks, name))


def test_ties_are_judged_by_the_reference() -> None:
    a = np.log(np.array([[0.4, 0.4 * math.exp(-TIE_MARGIN / 2), 0.1, 0.05]], np.float32))
    near, far = a[:, [1, 0, 2, 3]], a[:, [2, 1, 0, 3]]
    assert position_metrics(a, near, end_of_sequence(1)).agree.all()  # chose the tied second
    assert position_metrics(a, near, end_of_sequence(1)).tie.all()
    assert not position_metrics(a, far, end_of_sequence(1)).agree.any()  # a tie does not excuse the third


def test_a_tie_is_two_largest_values_that_are_near() -> None:
    a = np.concatenate([logprobs(40, 9, seed=8), np.zeros((1, 9), np.float32)])
    a[1, :2] = a[1].max()  # equal, not only near
    second = np.partition(a.astype(np.float64), -2, axis=1)[:, -2]
    found = position_metrics(a, a, end_of_sequence(41), tie_margin=0.05)
    np.testing.assert_array_equal(found.tie, a.max(axis=1) - second <= 0.05)
    assert found.tie[1] and found.tie[40] and not found.tie.all()
    assert not position_metrics(a[:, :1], a[:, :1], end_of_sequence(41)).tie.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_bad_values_poison_the_summary(value: float) -> None:
    a = logprobs(4, 16, seed=7)
    b = a.copy()
    b[2, 5] = value
    found = position_metrics(a, b, end_of_sequence(4))
    assert found.bad.tolist() == [False, False, True, False]
    summary = found.summary()
    assert summary.bad_positions == 1
    assert summary.kl_mean == summary.kl_max == summary.nmse_max == summary.nmse_mean == math.inf
    assert summary.disagreements == 1


def test_minus_infinity_is_an_underflow_only_where_the_reference_is_below_the_floor() -> None:
    a = np.array([[0.0, -100.0, -90.0]], np.float32)
    found = position_metrics(a, np.array([[0.0, -np.inf, -85.0]], np.float32), end_of_sequence(1))
    assert not found.bad.any()
    assert found.nmse[0] == 0.0
    assert position_metrics(a, np.array([[-np.inf, 0.0, -85.0]], np.float32), end_of_sequence(1)).bad.all()


def test_shapes_and_a_broken_reference_are_refused() -> None:
    a = logprobs(3, 8, seed=8)
    with pytest.raises(ValueError, match="shapes"):
        position_metrics(a, a[:, :7], end_of_sequence(3))
    with pytest.raises(ValueError, match="shapes"):
        position_metrics(a, a, end_of_sequence(2))
    broken = a.copy()
    broken[0, 0] = np.nan
    with pytest.raises(ValueError, match="reference"):
        position_metrics(broken, a, end_of_sequence(3))


def test_perplexity_is_that_of_the_next_ids() -> None:
    ids, lengths = np.array([3, 1, 2, 0, 4], np.int32), np.array([3, 2], np.int32)
    following = following_ids(ids, lengths)
    assert following.tolist() == [1, 2, -1, 4, -1]
    a = logprobs(5, 6, seed=9)
    expected = math.exp(-(float(a[0, 1]) + float(a[1, 2]) + float(a[3, 4])) / 3)
    summary = position_metrics(a, a, following).summary()
    assert summary.perplexity_reference == pytest.approx(expected, rel=1e-6)
    assert summary.perplexity_runtime == summary.perplexity_reference
    assert math.isnan(perplexity(np.full(2, np.nan)))


def test_quantiles_and_counts() -> None:
    a, b = logprobs(300, 12, seed=10), logprobs(300, 12, seed=11)
    found, summary = (
        position_metrics(a, b, end_of_sequence(300)),
        position_metrics(a, b, end_of_sequence(300)).summary(),
    )
    assert summary.kl_p99 == pytest.approx(np.quantile(found.kl, 0.99))
    assert summary.kl_max == found.kl.max()
    assert summary.top1 == pytest.approx(1 - summary.disagreements / 300)


def test_sensitive_positions_are_scaled_and_ordinary_ones_are_not() -> None:
    a, b = logprobs(3, 20, seed=12), logprobs(3, 20, seed=13)
    found = position_metrics(a, b, end_of_sequence(3))
    scaled = found.scaled_by(np.array([1e-13, ORDINARY, 8 * ORDINARY]))
    np.testing.assert_allclose(scaled.sensitivity, [1, 1, 8])
    assert scaled.summary().nmse_max == found.summary().nmse_max
    assert scaled.summary().nmse_scaled_max == max(found.nmse[0], found.nmse[1], found.nmse[2] / 8)


def test_perplexity_shift_is_the_mean_change_of_the_next_ids() -> None:
    a, b = logprobs(30, 9, seed=16), logprobs(30, 9, seed=17)
    following = np.append(np.arange(29) % 9, -1).astype(np.int32)
    rows = np.arange(29)
    expected = abs(float((b.astype(np.float64) - a)[rows, following[:29]].mean()))
    assert position_metrics(a, b, following).summary().perplexity_shift == pytest.approx(expected, rel=1e-5)
