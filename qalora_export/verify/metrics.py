"""Distances between two sets of next-token distributions, position by position. numpy only, float64 inside.

Both sides are natural log-probabilities, float32 (positions, vocabulary): log-softmax of the logits. Conventions:

* Log-softmax differs from the logits by one constant per position. Every row is therefore centred (its mean over the
  vocabulary subtracted) before NMSE, which makes the figure equal to the NMSE of centred logits:
      NMSE = Σ_v (b̂_v - â_v)² / Σ_v â_v²,   â = a - mean(a)
* KL(ref‖rt) = Σ_v p_v (ln p_v - ln r_v) in nats, both sides renormalised in float64 first: a float32 log-softmax sums
  to one only within 1e-7, which is far above the divergences of an exact path.
* Values below FLOOR carry no probability a float32 can hold, and some runtimes compute log(softmax), so both sides
  are clamped there. NaN and +Inf never pass, and -Inf passes only where the reference is below the floor too.
* An ill-conditioned position amplifies float32 rounding: sums of large activations that cancel later leave what they
  were rounded by. `scaled_by` divides its NMSE by how much more noise float32 makes there, so that one bound fits all.
* A runtime's top token agrees when it is the reference's own, or when the reference rates it within TIE_MARGIN of its
  best.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

# exp(-80) = 2e-35; float32 becomes subnormal at exp(-87.3).
FLOOR = -80.0
# An NMSE of 1e-9 is an error of 3e-5 standard deviations; logits spread by about 3, two of them are compared, and the
# largest of thousands of errors is about 6 standard deviations: 2 · 6 · 3 · 3e-5 = 1e-3 nats.
TIE_MARGIN = 1e-3
# NMSE up to which float32 kernels of different libraries may differ at an ordinary position.
EXACT = 1e-9
# Noise of float32 rounding (reference.logits.rounding_noise) above which a position counts as ill-conditioned. Exact
# paths of SmolLM2-135M and of random models of 4 to 30 layers are twice that noise in the median, 53 times at most
# (tests/benchmarks/rounding.py).
ORDINARY = EXACT / 125
# Logits of one row block: a dozen float64 temporaries of so many stay in the caches and in memory that is ours already.
BLOCK_VALUES = 2**16
THREADS = 2  # blocks at once


@dataclass(frozen=True, slots=True)
class PositionMetrics:
    """One value per position, in probe order; shape (positions,).

    nmse, kl: float64, NaN where the runtime's row holds a bad value.  agree, tie, bad: bool.
    next_reference, next_runtime: log-probability of the token that follows, NaN at the end of a sequence.
    sensitivity: at least 1; how much more than an ordinary position this one amplifies rounding.
    """

    nmse: NDArray[np.float64]
    kl: NDArray[np.float64]
    agree: NDArray[np.bool_]
    tie: NDArray[np.bool_]
    bad: NDArray[np.bool_]
    next_reference: NDArray[np.float64]
    next_runtime: NDArray[np.float64]
    sensitivity: NDArray[np.float64]

    def summary(self) -> Summary:
        """The figures that gates look at. With any bad position NMSE and KL are infinite: nothing may hide a NaN."""
        poisoned = bool(self.bad.any())
        figures = _figures(self)
        if poisoned:
            figures |= dict.fromkeys(POISONABLE, float("inf"))
        return Summary(
            positions=int(self.kl.size),
            bad_positions=int(self.bad.sum()),
            **figures,
            nmse_max=float("inf") if poisoned else float(self.nmse.max()),
            nmse_scaled_max=float("inf") if poisoned else float((self.nmse / self.sensitivity).max()),
            kl_max=float("inf") if poisoned else float(self.kl.max()),
            top1=float(self.agree.mean()),
            ties=int(self.tie.sum()),
            perplexity_reference=perplexity(self.next_reference),
            perplexity_runtime=perplexity(self.next_runtime),
        )

    def scaled_by(self, noise: NDArray[np.float64]) -> PositionMetrics:
        """The same metrics knowing how sensitive each position is: noise of float32 rounding (positions,)."""
        return replace(self, sensitivity=np.maximum(1.0, noise / ORDINARY))


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures over all positions. kl_* in nats; top1 is a share of positions; bad_positions: rows with NaN or Inf.

    nmse_scaled_max: largest NMSE after dividing by each position's sensitivity. perplexity_shift: nats by which the
    mean log-probability of the next token moved.
    """

    positions: int
    bad_positions: int
    nmse_mean: float
    nmse_max: float
    nmse_scaled_max: float
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1: float
    disagreements: float
    ties: int
    perplexity_shift: float
    perplexity_reference: float
    perplexity_runtime: float


POISONABLE = ("nmse_mean", "kl_mean", "kl_p99", "perplexity_shift")


def _figures(metrics: PositionMetrics) -> dict[str, float]:
    """Means, quantiles and counts over all positions."""
    shift = metrics.next_runtime - metrics.next_reference
    shift = shift[~np.isnan(shift)]
    return {
        "nmse_mean": float(metrics.nmse.mean()),
        "kl_mean": float(metrics.kl.mean()),
        "kl_p99": float(np.quantile(metrics.kl, 0.99)),
        "disagreements": float(np.count_nonzero(~metrics.agree)),
        "perplexity_shift": float(abs(shift.mean())) if shift.size else 0.0,
    }


def position_metrics(
    reference: NDArray[np.float32],
    runtime: NDArray[np.float32],
    following: NDArray[np.int32],
    *,
    tie_margin: float = TIE_MARGIN,
) -> PositionMetrics:
    """Metrics of every position.

    reference, runtime: float32 (positions, vocabulary). following: int32 (positions,), the id that comes next in the
    same sequence, -1 at its end. Raises ValueError when the shapes disagree.
    """
    if reference.shape != runtime.shape or following.shape != reference.shape[:1]:
        raise ValueError(f"shapes disagree: {reference.shape}, {runtime.shape}, {following.shape}")
    if np.isnan(reference).any() or (reference == np.inf).any():
        raise ValueError("the reference itself holds NaN or +Inf")
    with ThreadPoolExecutor(THREADS) as pool:  # numpy computes apart from Python's lock
        blocks = pool.map(
            lambda rows: _block(reference[rows], runtime[rows], following[rows], tie_margin),
            _row_blocks(reference.shape),
        )
        parts = list(blocks)
    columns = {f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(PositionMetrics)}
    return PositionMetrics(**columns)


def following_ids(ids: NDArray[np.int32], lengths: NDArray[np.int32]) -> NDArray[np.int32]:
    """The next id of the same sequence at every position, -1 at each sequence's end; int32 (total,)."""
    following = np.append(ids[1:], -1).astype(np.int32)
    following[np.cumsum(lengths) - 1] = -1
    return following


def next_logprobs(logprobs: NDArray[np.float32], following: NDArray[np.int32]) -> NDArray[np.float64]:
    """Log-probability of the token that follows, renormalised, (positions,); NaN at the end of a sequence."""
    found = np.full(len(logprobs), np.nan)
    for rows in _row_blocks(logprobs.shape):
        here = np.arange(rows.start, rows.start + len(logprobs[rows]))
        here = here[following[here] >= 0]
        if here.size:
            found[here] = _log_normalised(logprobs[here].astype(np.float64))[np.arange(here.size), following[here]]
    return found


def perplexity(next_logprobs: NDArray[np.float64]) -> float:
    """exp(-mean) over the positions that have a next token; inf when a value is not finite, nan when there is none."""
    values = next_logprobs[~np.isnan(next_logprobs)]
    if values.size == 0:
        return float("nan")
    with np.errstate(over="ignore"):
        return float(np.exp(-values.mean()))


def _block(
    reference: NDArray[np.float32], runtime: NDArray[np.float32], following: NDArray[np.int32], tie_margin: float
) -> PositionMetrics:
    a, b = reference.astype(np.float64), runtime.astype(np.float64)
    bad = (np.isnan(b) | (b == np.inf) | ((b == -np.inf) & (a > FLOOR))).any(axis=1)
    safe = np.where(bad[:, None], a, b)  # rows with NaN are reported as bad, not computed with
    a, safe = _log_normalised(np.maximum(a, FLOOR)), _log_normalised(np.maximum(safe, FLOOR))
    rows = np.arange(len(a))

    centred = a - a.mean(axis=1, keepdims=True)
    error = safe - safe.mean(axis=1, keepdims=True) - centred
    power = (centred**2).sum(axis=1)
    squared = (error**2).sum(axis=1)
    nmse = np.divide(squared, power, out=np.where(squared > 0, np.inf, 0.0), where=power > 0)
    kl = np.maximum((np.exp(a) * (a - safe)).sum(axis=1), 0.0)  # below zero only by rounding

    best, choice, others = a.max(axis=1), safe.argmax(axis=1), a.copy()
    others[rows, a.argmax(axis=1)] = -np.inf
    has_next = following >= 0
    target = np.where(has_next, following, 0)
    return PositionMetrics(
        nmse=np.where(bad, np.nan, nmse),
        kl=np.where(bad, np.nan, kl),
        agree=~bad & (best - a[rows, choice] <= tie_margin),
        tie=best - others.max(axis=1) <= tie_margin,
        bad=bad,
        next_reference=np.where(has_next, a[rows, target], np.nan),
        next_runtime=np.where(has_next, np.where(bad, -np.inf, safe[rows, target]), np.nan),
        sensitivity=np.ones(len(a)),
    )


def _log_normalised(logprobs: NDArray[np.float64]) -> NDArray[np.float64]:
    top = logprobs.max(axis=1, keepdims=True)
    normalized: NDArray[np.float64] = logprobs - (top + np.log(np.exp(logprobs - top).sum(axis=1, keepdims=True)))
    return normalized


def _row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    rows = max(1, BLOCK_VALUES // max(1, shape[1]))
    return (slice(start, start + rows) for start in range(0, shape[0], rows))
