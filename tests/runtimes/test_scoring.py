"""Log softmax against a slow oracle, and prefill where a runtime answers with the last position only."""

from __future__ import annotations

import math

import numpy as np
import pytest
from qalora_runtimes.protocol import make_job
from qalora_runtimes.runner import check_vocabulary, run_pass
from qalora_runtimes.scoring import RunnerError, every_position, log_softmax


@pytest.mark.parametrize("spread", [1e-3, 1.0, 50.0, 1e4])
def test_log_softmax_is_the_exact_value_rounded_once(spread: float):
    logits = (np.random.default_rng(1).normal(size=(5, 97)) * spread).astype(np.float32)
    slow = np.array(
        [
            [x - m - math.log(math.fsum(math.exp(y - m) for y in row)) for x in row]
            for row in logits.tolist()
            for m in [max(row)]
        ]
    )
    assert log_softmax(logits).dtype == np.float32
    np.testing.assert_array_max_ulp(log_softmax(logits), slow.astype(np.float32), maxulp=1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_overflow_in_one_logit_stays_visible_and_in_its_row(bad: float):
    logits = np.zeros((3, 4), np.float32)
    logits[1, 2] = bad
    out = log_softmax(logits)
    assert np.isnan(out[1]).any()
    assert np.isfinite(out[[0, 2]]).all()


def test_a_masked_token_keeps_minus_infinity():
    out = log_softmax(np.array([[0.0, -np.inf, 0.0]], np.float32))
    np.testing.assert_allclose(np.exp(out), [[0.5, 0.0, 0.5]], rtol=1e-6)


def fake_rows(ids: np.ndarray) -> np.ndarray:
    return np.cumsum(ids)[:, None] * np.ones((1, 3), np.float32)


def test_a_runtime_that_gives_only_the_last_position_is_run_on_every_prefix():
    ids, seen = np.array([3, 1, 4, 1], np.int32), []

    def last_only(prompt: np.ndarray) -> np.ndarray:
        seen.append(len(prompt))
        return fake_rows(prompt)[-1:]

    assert np.array_equal(every_position(last_only, ids), every_position(fake_rows, ids))
    assert sorted(seen) == [1, 2, 3, 4]
    with pytest.raises(RunnerError, match="2 of 4"):
        every_position(lambda prompt: fake_rows(prompt)[:2], ids)


class Fake:
    def prefill(self, ids):
        return fake_rows(ids)

    decode = prefill


def test_rows_keep_the_order_of_the_job_and_a_wrong_shape_is_refused():
    job = make_job([[1, 2], [5], [7, 8, 9]])
    seconds: dict[str, float] = {}
    assert run_pass(Fake(), job, "prefill", seconds).shape == (6, 3)
    assert seconds["prefill"] >= 0
    Fake.prefill = lambda _self, ids: fake_rows(ids)[:-1]
    with pytest.raises(RunnerError, match="shape"):
        run_pass(Fake(), job, "prefill", {})


def test_an_id_outside_the_vocabulary_is_refused():
    check_vocabulary(make_job([[0, 7]]), 8)
    with pytest.raises(RunnerError, match="token id 7 is outside"):
        check_vocabulary(make_job([[0, 7]]), 7)
