"""From raw logits to what the protocol carries, the same for every runtime."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from qalora_runtimes.protocol import Ids, Logprobs

Rows = NDArray[np.float32]


class RunnerError(RuntimeError):
    """The runtime works but cannot do what the job asks (exit code 2)."""


class MissingRuntimeError(RuntimeError):
    """The runtime's Python package is not installed (exit code 3)."""

    def __init__(self, package: str, reason: object) -> None:
        super().__init__(f"{package} is not installed ({reason}); install it with: pip install {package}")


def log_softmax(logits: Rows) -> Logprobs:
    """(n, vocab) logits → float32 log-probabilities; exp and sum in float64, one rounding at the end.

    A row with NaN or +Inf becomes NaN throughout: overflow in a kernel must stay visible.
    """
    wide = logits.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        wide -= wide.max(axis=-1, keepdims=True)
        wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
        return wide.astype(np.float32)


def every_position(run_prompt: Callable[[Ids], Rows], ids: Ids) -> Rows:
    """Logits (len(ids), vocab) of a prompt run as one batch.

    Where the runtime answers with the last position only, every prefix is run as a fresh prompt, so that the rows
    still come from prompt kernels and not from the KV cache. Raises RunnerError for any other row count.
    """
    rows = run_prompt(ids)
    if len(rows) == len(ids):
        return rows
    if len(rows) != 1:
        raise RunnerError(f"the runtime returned logits for {len(rows)} of {len(ids)} positions")
    return np.concatenate([*(run_prompt(ids[:end]) for end in range(1, len(ids))), rows])
