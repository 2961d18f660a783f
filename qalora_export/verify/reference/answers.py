"""Whether greedy answers are the reference's own, token by token.

The reference reads a prompt and an answer at once. Where every token of the answer is the likeliest one behind the
tokens before it, the reference would have written the same answer. Where one is not, its margin says by how much: that
of the reference's choice over it, in nats. Behind such a token the comparison goes on from what the runtime wrote.

A near-tie is a margin that the runtime's kernels may turn over: at most NEAR times what rounding activations to int8
does to the log-probabilities of that very position in PyTorch (their spread over the vocabulary), times how much more
the runtime's shipped path cost on the probe set than that simulation (at most MOST_COST). The difference of two
log-probabilities of independent normal errors spreads by √2; NEAR is 6 of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from qalora_export.verify.reference.layerwise import LayerwiseModel
from qalora_export.verify.reference.logits import fixed_threads, round_to_int8

NEAR = 6 * 2**0.5
MOST_COST = 3.0


@dataclass(frozen=True)
class Answer:
    """What was generated behind `prompt`. name: of the question."""

    name: str
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def sequence(self) -> NDArray[np.int32]:
        """Prompt and answer but for its last token, behind which nothing is asked."""
        return np.array([*self.prompt, *self.tokens[:-1]], np.int32)

    @property
    def kept(self) -> NDArray[np.int64]:
        """Positions of `sequence` that choose the tokens."""
        return np.arange(len(self.prompt) - 1, len(self.prompt) + len(self.tokens) - 1)


@dataclass(frozen=True, slots=True)
class Deviation:
    """A token that is not the reference's choice. margin: nats. spread: of int8 rounding there, in nats."""

    name: str
    index: int
    token: int
    wanted: int
    margin: float
    spread: float

    def near(self, cost: float) -> bool:
        return self.margin <= NEAR * self.spread * min(max(cost, 1.0), MOST_COST)


@dataclass
class GreedyReference:
    """Judges answers of one checkpoint; what several runtimes answered alike is computed once."""

    checkpoint: Path
    threads: int
    _known: dict[tuple[tuple[int, ...], tuple[int, ...]], list[Deviation]] = field(default_factory=dict)

    def deviations(self, answers: Sequence[Answer]) -> list[Deviation]:
        """In the order of the answers. An answer without a token has none."""
        asked = {(a.prompt, a.tokens): a for a in answers if a.tokens and (a.prompt, a.tokens) not in self._known}
        fresh = list(asked.values())
        if fresh:
            for answer, found in zip(fresh, self._judged(fresh), strict=True):
                self._known[answer.prompt, answer.tokens] = found
        named = ((answer.name, self._known.get((answer.prompt, answer.tokens), [])) for answer in answers)
        return [Deviation(name, d.index, d.token, d.wanted, d.margin, d.spread) for name, found in named for d in found]

    def _judged(self, answers: list[Answer]) -> list[list[Deviation]]:
        exact = self._logprobs(answers, rounded=False)
        other = [index for index, (a, rows) in enumerate(zip(answers, exact, strict=True)) if _others(a, rows)]
        rounded = self._logprobs([answers[index] for index in other], rounded=True) if other else []
        noisy = dict(zip(other, rounded, strict=True))
        return [
            [
                _deviation(answer, at, rows[at], noisy[index][at])
                for at in (_others(answer, rows) if index in noisy else [])
            ]
            for index, (answer, rows) in enumerate(zip(answers, exact, strict=True))
        ]

    def _logprobs(self, answers: list[Answer], *, rounded: bool) -> list[NDArray[np.float32]]:
        """float32 (tokens, vocabulary) of each answer."""
        with fixed_threads(self.threads), torch.inference_mode():
            model = LayerwiseModel(self.checkpoint, rounding=round_to_int8 if rounded else None)
            kept = [answer.kept for answer in answers]
            (rows,) = model.run([answer.sequence for answer in answers], decode=False, kept=kept)
        return np.split(rows, np.cumsum([len(each) for each in kept])[:-1])


def _others(answer: Answer, rows: NDArray[np.float32]) -> list[int]:
    """Indices of tokens that are less likely than the likeliest."""
    chosen = rows[np.arange(len(rows)), list(answer.tokens)]
    return [int(index) for index in np.flatnonzero(~(chosen >= rows.max(axis=-1)))]


def _deviation(answer: Answer, at: int, row: NDArray[np.float32], rounded: NDArray[np.float32]) -> Deviation:
    token, wanted = answer.tokens[at], int(np.argmax(row))
    margin = float(row[wanted]) - float(row[token])
    change = rounded.astype(np.float64) - row
    return Deviation(answer.name, at, token, wanted, margin, float(change.std()))
