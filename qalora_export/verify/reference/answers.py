"""Whether greedy answers are the reference's own, token by token.

The reference reads a prompt and an answer at once. Where every token of the answer is the likeliest one behind the
tokens before it, the reference would have written the same answer. Where one is not, its margin says by how much: that
of the reference's choice over it, in nats. Behind such a token the comparison goes on from what the runtime wrote.

A near-tie is a margin that the runtime's kernels may turn over: at most NEAR times what rounding activations to int8
does to that very margin in PyTorch, times how much more the runtime's shipped path cost on the probe set than that
simulation (at most MOST_COST). int8 noise is chaotic: what one rounding does to a margin says little about the next.
So it is rounded DRAWS times, every activation disturbed first by what float16 may do to it, as it is in llama.cpp's
attention; the root mean square counts, or √2 times the spread over the vocabulary where that is more.
Measured at a position of a fine-tuned model where one rounding spread by 0.04 nats and llama.cpp's by 0.67: -0.5 to 0.6
over 12 draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from qalora_export.verify.reference.layerwise import Change, LayerwiseModel
from qalora_export.verify.reference.logits import PACKAGES, fixed_threads, round_to_int8
from qalora_export.verify.store import remembered

NEAR = 6.0
DRAWS, SEED = 16, 0
DRAWN = 4  # places of one answer, those with the largest margins: a smaller margin has the least spread of these
FLOAT16 = 2.0**-11  # half a unit in the last place, relative
MOST_COST = 3.0
COLUMNS = 6  # of a kept deviation: number of the answer, index, token, wanted, margin, spread


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
    """A token that is not the reference's choice. margin: nats. spread: of that margin under int8 rounding, in nats."""

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
            for answer, found in zip(fresh, self._remembered(fresh), strict=True):
                self._known[answer.prompt, answer.tokens] = found
        named = ((answer.name, self._known.get((answer.prompt, answer.tokens), [])) for answer in answers)
        return [Deviation(name, d.index, d.token, d.wanted, d.margin, d.spread) for name, found in named for d in found]

    def _remembered(self, answers: list[Answer]) -> list[list[Deviation]]:
        """_judged, or what it found before of the same answers of this checkpoint."""

        def compute() -> dict[str, NDArray[np.float64]]:
            found = self._judged(answers)
            rows = [
                (number, d.index, d.token, d.wanted, d.margin, d.spread) for number, of in enumerate(found) for d in of
            ]
            return {"deviations": np.array(rows, np.float64).reshape(-1, COLUMNS)}

        asked = [[list(answer.prompt), list(answer.tokens)] for answer in answers]
        kept = remembered(
            "greedy answers", compute, of=self.checkpoint, packages=PACKAGES, answers=asked, threads=self.threads
        )["deviations"]
        found: list[list[Deviation]] = [[] for _ in answers]
        for number, index, token, wanted, margin, spread in kept.tolist():
            deviation = Deviation(answers[int(number)].name, int(index), int(token), int(wanted), margin, spread)
            found[int(number)].append(deviation)
        return found

    def _judged(self, answers: list[Answer]) -> list[list[Deviation]]:
        exact = self._logprobs([(answer, answer.kept) for answer in answers])
        wrong = [_others(answer, rows) for answer, rows in zip(answers, exact, strict=True)]
        drawn = [_widest(answer, rows, at) for answer, rows, at in zip(answers, exact, wrong, strict=True)]
        places = [(answer, answer.kept[at]) for answer, at in zip(answers, drawn, strict=True) if at]
        noisy = iter(self._draws(places) if places else [])
        found = list[list[Deviation]]()
        for answer, rows, at, chosen in zip(answers, exact, wrong, drawn, strict=True):
            draws = [next(noisy) for _ in range(DRAWS)] if at else []
            spread = {i: _spread(answer, i, rows[i], np.stack([d[k] for d in draws])) for k, i in enumerate(chosen)}
            least = min(spread.values(), default=0.0)
            found.append([_deviation(answer, i, rows[i], spread.get(i, least)) for i in at])
        return found

    def _logprobs(self, places: list[tuple[Answer, NDArray[np.int64]]]) -> list[NDArray[np.float32]]:
        """float32 (positions, vocabulary) of each answer at those positions."""
        with fixed_threads(self.threads), torch.inference_mode():
            kept = [positions for _, positions in places]
            (rows,) = LayerwiseModel(self.checkpoint).run(_sequences(places), decode=False, kept=kept)
        return np.split(rows, np.cumsum([len(each) for each in kept])[:-1])

    def _draws(self, places: list[tuple[Answer, NDArray[np.int64]]]) -> list[NDArray[np.float32]]:
        """The same with noise, DRAWS of each answer."""
        with fixed_threads(self.threads), torch.inference_mode():
            model = LayerwiseModel(self.checkpoint, rounding=noise())
            return list(model.copies(_sequences(places), DRAWS, kept=[positions for _, positions in places]))


def _sequences(places: list[tuple[Answer, NDArray[np.int64]]]) -> list[NDArray[np.int32]]:
    return [answer.sequence for answer, _ in places]


def noise() -> Change:
    """int8 rounding of what float16 may have disturbed, another draw at every call; the same sequence in every run."""
    generator = torch.Generator().manual_seed(SEED)

    def rounding(x: torch.Tensor) -> torch.Tensor:
        return round_to_int8(x * (1 + FLOAT16 * (2 * torch.rand(x.shape, generator=generator) - 1)))

    return rounding


def _others(answer: Answer, rows: NDArray[np.float32]) -> list[int]:
    """Indices of tokens that are less likely than the likeliest."""
    chosen = rows[np.arange(len(rows)), list(answer.tokens)]
    return [int(index) for index in np.flatnonzero(~(chosen >= rows.max(axis=-1)))]


def _widest(answer: Answer, rows: NDArray[np.float32], at: list[int]) -> list[int]:
    """The DRAWN places of `at` with the largest margins, in order."""
    return sorted(sorted(at, key=lambda i: float(rows[i][answer.tokens[i]] - rows[i].max()))[:DRAWN])


def _spread(answer: Answer, at: int, row: NDArray[np.float32], draws: NDArray[np.float32]) -> float:
    """row: float32 (vocabulary,) log-probabilities. draws: the same of every draw, (DRAWS, vocabulary)."""
    change = draws.astype(np.float64) - row
    margin = change[:, int(np.argmax(row))] - change[:, answer.tokens[at]]
    return float(max(np.sqrt(np.mean(margin**2)), np.sqrt(2 * np.mean(change.var(axis=1)))))


def _deviation(answer: Answer, at: int, row: NDArray[np.float32], spread: float) -> Deviation:
    token, wanted = answer.tokens[at], int(np.argmax(row))
    return Deviation(answer.name, at, token, wanted, float(row[wanted]) - float(row[token]), spread)
