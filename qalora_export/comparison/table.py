"""Cells → rows: one method at one width, its best learning rate, mean and spread over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from qalora_export.comparison.cells import Measured, Speed


@dataclass(frozen=True, slots=True)
class Row:
    """bits: None for 16-bit weights and for NF4. loss (of the answers), text (of the held-out text, empty without one),
    score: one value per seed; empty where training diverged.

    rate: the learning rate with the lowest validation loss on the first seed, None where nothing is trained. gates: of
    the first seed. speed: of the layout. runtime_score: share of exact answers
    by llama.cpp on the deployed file, of the first seed.
    """

    method: str
    title: str
    bits: int | None
    bits_per_weight: float
    trainable: int
    rate: float | None
    loss: tuple[float, ...]
    score: tuple[float, ...]
    seconds: float
    ships: str
    gates: str | None
    speed: Speed | None = None
    runtime_score: float | None = None
    text: tuple[float, ...] = ()

    @property
    def judged(self) -> tuple[float, ...]:
        """The losses that claims and plot go by: of the held-out text, without one of the answers."""
        return self.text or self.loss

    @property
    def mean_loss(self) -> float | None:
        return statistics.mean(self.judged) if self.judged else None


def best_rate(rates: Iterable[float], measured: Callable[[float], Measured]) -> Measured:
    """The cell at the learning rate with the lowest validation loss, found by climbing: from the middle one upwards as
    long as the loss falls, and where it never did, downwards.

    What lies behind a worse one is not trained: the loss has one valley over the rate. Of rates that all diverge, the
    lowest.
    """
    rates = sorted(rates)
    middle = len(rates) // 2
    start = best = measured(rates[middle])
    for rate in rates[middle + 1 :]:
        tried = measured(rate)
        if _validated(tried) >= _validated(best):
            break
        best = tried
    if best is not start:
        return best
    for rate in reversed(rates[:middle]):
        tried = measured(rate)
        if _validated(tried) > _validated(best):  # equal: both diverged
            break
        best = tried
    return best


def confirmed(
    best: float, tried: Mapping[float, Measured], others: Callable[[float], list[Measured]]
) -> list[Measured]:
    """The cells of all seeds at the best rate, the first seed's first.

    tried: the first seed's by rate; others: those of the other seeds at a rate. One seed may be lucky: where the mean
    validation loss over seeds is above what the first seed had at another rate, that one is tried with all seeds, too.
    """
    cells = [tried[best], *others(best)]
    for rate in sorted(set(tried) - {best}, key=lambda rate: _validated(tried[rate])):
        if _mean_validated(cells) <= _validated(tried[rate]):
            break
        instead = [tried[rate], *others(rate)]
        if _mean_validated(instead) < _mean_validated(cells):
            cells = instead
    return cells


def _mean_validated(cells: Sequence[Measured]) -> float:
    return statistics.mean(map(_validated, cells))


def _validated(cell: Measured) -> float:
    return float("inf") if cell.validation_loss is None else cell.validation_loss


def row_of(title: str, cells: Sequence[Measured]) -> Row:
    """cells: one per seed, the first seed's first."""
    first = cells[0]
    return Row(
        first.cell.method,
        title,
        first.cell.bits,
        first.bits_per_weight,
        first.trainable,
        first.cell.rate,
        tuple(m.held_out_loss for m in cells if m.held_out_loss is not None),
        tuple(m.score for m in cells if m.score is not None),
        statistics.mean(m.seconds for m in cells),
        first.ships,
        first.gates,
        first.speed,
        None if first.answered is None or not first.total else first.answered / first.total,
        tuple(m.text_loss for m in cells if m.text_loss is not None),
    )


def spread(values: Sequence[float], form: str) -> str:
    """ "mean ± standard deviation", the deviation only of two values or more; "diverged" of none."""
    if not values:
        return "diverged"
    mean = format(statistics.mean(values), form)
    return mean if len(values) < 2 else f"{mean} ± {format(statistics.stdev(values), form)}"


HEADINGS = (
    "method",
    "bits/weight",
    "held-out text",
    "answers",
    "score",
    "in llama.cpp",
    "decode",
    "GGUF bits",
    "trained",
    "rate",
    "s",
    "ships as",
    "parity",
)


def cells_of(row: Row) -> tuple[str, ...]:
    """The row as text, under HEADINGS."""
    return (
        row.title,
        f"{row.bits_per_weight:.2f}",
        spread(row.text, ".4f") if row.text or not row.loss else "–",
        spread(row.loss, ".4f"),
        spread(row.score, ".1%"),
        "–" if row.runtime_score is None else f"{row.runtime_score:.1%}",
        "–" if row.speed is None else f"{row.speed.of_base:.2f}×",
        "–" if row.speed is None else f"{row.speed.bits_per_weight:.2f}",
        f"{row.trainable:,}" if row.trainable else "–",
        "–" if row.rate is None else f"{row.rate:g}",
        f"{row.seconds:.0f}" if row.trainable else "–",
        row.ships,
        row.gates or "–",
    )


def markdown(rows: Sequence[Row]) -> str:
    """A table that any forge renders."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
    return "\n".join(lines + ["| " + " | ".join(cells_of(row)) + " |" for row in rows]) + "\n"
