"""What the papers claim, held or not held by the rows of a comparison.

A claim about losses is not settled when the means are closer than the error of their difference, which the seeds give.
A row of one seed deviates as those of several do on average; where no row has several, nothing is known and the numbers
are taken as they are. A claim whose rows are missing is not measured.

QA-LoRA: arXiv 2309.14717 (Tables 1 and 2, §3.3). LQ-LoRA: arXiv 2311.12023 (Table 2).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from qalora_export.comparison.table import Row, spread

HELD, NOT_HELD, NOT_SETTLED, NOT_MEASURED = "held", "not held", "not settled", "not measured"


@dataclass(frozen=True, slots=True)
class Claim:
    """verdict: one of the four above. figure: the numbers it was judged by."""

    text: str
    verdict: str
    figure: str


@dataclass(frozen=True, slots=True)
class _Mean:
    """A mean over seeds or a difference of such, nats. error: its standard error."""

    value: float
    error: float

    def __sub__(self, other: _Mean) -> _Mean:
        return _Mean(self.value - other.value, math.hypot(self.error, other.error))

    def half(self) -> _Mean:
        return _Mean(self.value / 2, self.error / 2)

    def below_zero(self, *, strictly: bool = False) -> str:
        if abs(self.value) <= self.error > 0:
            return NOT_SETTLED
        return HELD if self.value < 0 or (self.value == 0 and not strictly) else NOT_HELD


class _MissingError(Exception):
    """A row that a claim needs is not there."""


class _Rows:
    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = {(row.method, row.bits): row for row in rows}
        variances = [statistics.variance(row.judged) for row in rows if len(row.judged) > 1]
        self._usual = math.sqrt(statistics.mean(variances)) if variances else 0.0

    def loss(self, method: str, bits: int | None = None) -> _Mean:
        values = self._losses(method, bits)
        deviation = statistics.stdev(values) if len(values) > 1 else self._usual
        return _Mean(statistics.mean(values), deviation / math.sqrt(len(values)))

    def said(self, method: str, bits: int | None = None) -> str:
        """The loss as text, with its deviation over seeds."""
        return spread(self._losses(method, bits), ".4f")

    def trainable(self, method: str, bits: int | None = None) -> int:
        return self._row(method, bits).trainable

    def seconds(self, method: str, bits: int | None = None) -> float:
        return self._row(method, bits).seconds

    def _losses(self, method: str, bits: int | None) -> tuple[float, ...]:
        values = self._row(method, bits).judged
        if not values:
            raise _MissingError
        return values

    def _row(self, method: str, bits: int | None) -> Row:
        if (method, bits) not in self._rows:
            raise _MissingError
        return self._rows[method, bits]


Judge = Callable[[_Rows], tuple[str, str]]  # verdict and figure


def judged(rows: Sequence[Row]) -> list[Claim]:
    """Every claim, in order."""
    table = _Rows(rows)
    found = []
    for text, judge in CLAIMS:
        try:
            verdict, figure = judge(table)
        except _MissingError:
            verdict, figure = NOT_MEASURED, "a row is missing"
        found.append(Claim(text, verdict, figure))
    return found


def _all(verdicts: Iterable[str]) -> str:
    """Of a claim in several parts: the worst of them."""
    return max(verdicts, key=(HELD, NOT_SETTLED, NOT_HELD).index)


def _plainly(held: bool) -> str:
    return HELD if held else NOT_HELD


def _quantizing_again_loses(rows: _Rows) -> tuple[str, str]:
    again = rows.loss("qlora+gptq", 4)
    verdict = _all((other - again).below_zero(strictly=True) for other in (rows.loss("qa-lora", 4), rows.loss("qlora")))
    return verdict, f"{rows.said('qlora+gptq', 4)} against {rows.said('qa-lora', 4)} and {rows.said('qlora')} nats"


def _gap_grows(rows: _Rows) -> tuple[str, str]:
    gaps = [rows.loss("qlora+gptq", bits) - rows.loss("qa-lora", bits) for bits in (4, 3, 2)]
    verdict = _all((less - more).below_zero(strictly=True) for less, more in itertools.pairwise(gaps))
    return verdict, ", ".join(f"{gap.value:+.4f} ± {gap.error:.4f}" for gap in gaps) + " nats at 4, 3, 2 bits"


def _half_of_the_parameters(rows: _Rows) -> tuple[str, str]:
    ours, theirs = rows.trainable("qa-lora", 4), rows.trainable("qlora")
    return _plainly(0.4 <= ours / theirs <= 0.6), f"{ours:,} against {theirs:,}: {ours / theirs:.2f}"


def _coarser_trades(rows: _Rows) -> tuple[str, str]:
    fine, coarse = (rows.trainable(method, 4) for method in ("qa-lora", "qa-lora-coarse"))
    more = [rows.loss("qa-lora-coarse", bits) - rows.loss("qa-lora", bits) for bits in (4, 2)]
    figure = ", ".join(f"{each.value:+.4f} ± {each.error:.4f}" for each in more)
    verdicts = [_Mean(-each.value, each.error).below_zero(strictly=True) for each in more]
    return _all([_plainly(coarse < fine), *verdicts]), f"{figure} nats at 4, 2 bits, {coarse:,} of {fine:,} parameters"


def _no_slower(rows: _Rows) -> tuple[str, str]:
    ours, theirs = rows.seconds("qa-lora", 4), rows.seconds("qlora")
    return _plainly(ours <= theirs), f"{ours:.0f} against {theirs:.0f} s"


def _below(ours: str, theirs: str, *, bits: tuple[int, ...] = (3, 2), strictly: bool = False) -> Judge:
    """Whether one method's loss is below another's at each of `bits`."""

    def judge(rows: _Rows) -> tuple[str, str]:
        verdict = _all((rows.loss(ours, each) - rows.loss(theirs, each)).below_zero(strictly=strictly) for each in bits)
        figure = ", ".join(f"{rows.said(ours, each)} against {rows.said(theirs, each)}" for each in bits)
        return verdict, f"{figure} nats at {', '.join(map(str, bits))} bits"

    return judge


def _against(ours: tuple[str, int], theirs: tuple[str, int | None], *, margin: float = 0.0) -> Judge:
    """Whether the loss of one row, a method at some bits, is below another's plus `margin` nats."""

    def judge(rows: _Rows) -> tuple[str, str]:
        difference = rows.loss(*ours) - rows.loss(*theirs) - _Mean(margin, 0.0)
        return difference.below_zero(), f"{rows.said(*ours)} against {rows.said(*theirs)} nats"

    return judge


def _plus_closes_half(rows: _Rows) -> tuple[str, str]:
    """plus ≤ (QA-LoRA + LoRA) / 2: so the errors of all three count."""
    verdicts, figures = [], []
    for bits in (3, 2):
        plain, plus, lora = rows.loss("qa-lora", bits), rows.loss("qa-lora+", bits), rows.loss("lora")
        verdicts.append((plus - plain.half() - lora.half()).below_zero())
        figures.append(f"{rows.said('qa-lora+', bits)} after {rows.said('qa-lora', bits)}")
    return _all(verdicts), f"{', '.join(figures)} nats at 3, 2 bits, LoRA {rows.said('lora')}"


CLAIMS: tuple[tuple[str, Judge], ...] = (
    ("QA-LoRA at 4 bits is no worse than QLoRA unmerged (4 + 16)", _against(("qa-lora", 4), ("qlora", None))),
    ("QLoRA merged and quantized again falls below both", _quantizing_again_loses),
    ("that gap grows at 3 and 2 bits", _gap_grows),
    ("QA-LoRA trains about half of LoRA's parameters at equal rank", _half_of_the_parameters),
    ("LQ-LoRA at 2 bits beats QLoRA merged and quantized", _below("lq-lora", "qlora+gptq", bits=(2,), strictly=True)),
    ("larger groups trade accuracy for parameters", _coarser_trades),
    ("QA-LoRA trains no slower than QLoRA at equal steps", _no_slower),
    (
        "bits by matrix are no worse than uniform ones for LQ-LoRA at 3 and 2 bits",
        _below("lq-lora-mixed", "lq-lora-fisher"),
    ),
    (
        "ours: nor are they for QA-LoRA at 4 and 3 bits",
        _below("qa-lora-mixed", "qa-lora", bits=(4, 3)),
    ),
    (
        "ours: offsets refitted in closed form are a better start than zero at 3 and 2 bits",
        _below("qa-lora-refit", "qa-lora-plain", strictly=True),
    ),
    (
        "ours: QA-LoRA at 4 bits beats QLoRA merged, then Q4_K_M",
        _below("qa-lora", "qlora+k-quants", bits=(4,), strictly=True),
    ),
    (
        "ours: QA-LoRA+ at 4 bits is within 0.01 nats of 16-bit LoRA at equal parameters",
        _against(("qa-lora+", 4), ("lora", None), margin=0.01),
    ),
    ("ours: QA-LoRA+ closes half of QA-LoRA's remaining gap at 3 and 2 bits", _plus_closes_half),
)
