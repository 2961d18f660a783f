"""What the papers claim, held or not held by the rows of a comparison; a claim whose rows are missing is not judged.

QA-LoRA: arXiv 2309.14717 (Tables 1 and 2, §3.3). LQ-LoRA: arXiv 2311.12023 (Table 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qalora_export.comparison.table import Row, spread


@dataclass(frozen=True, slots=True)
class Claim:
    """held: None when the rows that it is about were not measured. figure: the numbers it was judged by."""

    text: str
    held: bool | None
    figure: str

    @property
    def verdict(self) -> str:
        return {True: "held", False: "not held", None: "not measured"}[self.held]


class _MissingError(Exception):
    """A row that a claim needs is not there."""


class _Rows:
    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = {(row.method, row.bits): row for row in rows}

    def loss(self, method: str, bits: int | None = None) -> float:
        row = self._rows.get((method, bits))
        if row is None or row.mean_loss is None:
            raise _MissingError
        return row.mean_loss

    def said(self, method: str, bits: int | None = None) -> str:
        """The loss as text, with its deviation over seeds."""
        return spread(self._row(method, bits).judged, ".4f")

    def trainable(self, method: str, bits: int | None = None) -> int:
        return self._row(method, bits).trainable

    def seconds(self, method: str, bits: int | None = None) -> float:
        return self._row(method, bits).seconds

    def _row(self, method: str, bits: int | None) -> Row:
        if (method, bits) not in self._rows:
            raise _MissingError
        return self._rows[method, bits]


def judged(rows: Sequence[Row]) -> list[Claim]:
    """Every claim, in order."""
    table = _Rows(rows)
    found = []
    for text, judge in CLAIMS:
        try:
            held, figure = judge(table)
        except _MissingError:
            held, figure = None, "a row is missing"
        found.append(Claim(text, held, figure))
    return found


def _against_qlora(rows: _Rows) -> tuple[bool, str]:
    ours, theirs = rows.loss("qa-lora", 4), rows.loss("qlora")
    return ours <= theirs, f"{rows.said('qa-lora', 4)} against {rows.said('qlora')} nats"


def _quantizing_again_loses(rows: _Rows) -> tuple[bool, str]:
    ours, unmerged, again = rows.loss("qa-lora", 4), rows.loss("qlora"), rows.loss("qlora+gptq", 4)
    return again > max(ours, unmerged), (
        f"{rows.said('qlora+gptq', 4)} against {rows.said('qa-lora', 4)} and {rows.said('qlora')} nats"
    )


def _gap_grows(rows: _Rows) -> tuple[bool, str]:
    gaps = [rows.loss("qlora+gptq", bits) - rows.loss("qa-lora", bits) for bits in (4, 3, 2)]
    return gaps[0] < gaps[1] < gaps[2], ", ".join(f"{gap:+.4f}" for gap in gaps) + " nats at 4, 3, 2 bits"


def _half_of_the_parameters(rows: _Rows) -> tuple[bool, str]:
    ours, theirs = rows.trainable("qa-lora", 4), rows.trainable("qlora")
    return 0.4 <= ours / theirs <= 0.6, f"{ours:,} against {theirs:,}: {ours / theirs:.2f}"


def _lq_at_two_bits(rows: _Rows) -> tuple[bool, str]:
    ours, theirs = rows.loss("lq-lora", 2), rows.loss("qlora+gptq", 2)
    return ours < theirs, f"{rows.said('lq-lora', 2)} against {rows.said('qlora+gptq', 2)} nats"


def _coarser_trades(rows: _Rows) -> tuple[bool, str]:
    fine, coarse = (rows.trainable(method, 4) for method in ("qa-lora", "qa-lora-coarse"))
    more = [rows.loss("qa-lora-coarse", bits) - rows.loss("qa-lora", bits) for bits in (4, 2)]
    figure = ", ".join(f"{each:+.4f}" for each in more) + f" nats at 4, 2 bits, {coarse:,} of {fine:,} parameters"
    return coarse < fine and min(more) > 0, figure


def _no_slower(rows: _Rows) -> tuple[bool, str]:
    ours, theirs = rows.seconds("qa-lora", 4), rows.seconds("qlora")
    return ours <= theirs, f"{ours:.0f} against {theirs:.0f} s"


def _below(
    ours: str, theirs: str, *, bits: tuple[int, ...] = (3, 2), strictly: bool = False
) -> Callable[[_Rows], tuple[bool, str]]:
    """Whether one method's loss is below another's at each of `bits`."""

    def judge(rows: _Rows) -> tuple[bool, str]:
        pairs = [(rows.loss(ours, each), rows.loss(theirs, each)) for each in bits]
        held = all(mine < other if strictly else mine <= other for mine, other in pairs)
        figure = ", ".join(f"{rows.said(ours, each)} against {rows.said(theirs, each)}" for each in bits)
        return held, f"{figure} nats at {', '.join(map(str, bits))} bits"

    return judge


def _against_what_is_shipped(rows: _Rows) -> tuple[bool, str]:
    ours, theirs = rows.loss("qa-lora", 4), rows.loss("qlora+k-quants", 4)
    return ours < theirs, f"{rows.said('qa-lora', 4)} against {rows.said('qlora+k-quants', 4)} nats"


def _plus_reaches_lora(rows: _Rows) -> tuple[bool, str]:
    ours, theirs = rows.loss("qa-lora+", 4), rows.loss("lora")
    return ours <= theirs + 0.01, f"{rows.said('qa-lora+', 4)} against {rows.said('lora')} nats"


def _plus_closes_half(rows: _Rows) -> tuple[bool, str]:
    shares = []
    for bits in (3, 2):
        left = rows.loss("qa-lora", bits) - rows.loss("lora")
        shares.append((rows.loss("qa-lora", bits) - rows.loss("qa-lora+", bits)) / left if left > 0 else 1.0)
    return min(shares) >= 0.5, ", ".join(f"{share:.0%}" for share in shares) + " at 3, 2 bits"


CLAIMS: tuple[tuple[str, Callable[[_Rows], tuple[bool, str]]], ...] = (
    ("QA-LoRA at 4 bits is no worse than QLoRA unmerged (4 + 16)", _against_qlora),
    ("QLoRA merged and quantized again falls below both", _quantizing_again_loses),
    ("that gap grows at 3 and 2 bits", _gap_grows),
    ("QA-LoRA trains about half of LoRA's parameters at equal rank", _half_of_the_parameters),
    ("LQ-LoRA at 2 bits beats QLoRA merged and quantized", _lq_at_two_bits),
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
    ("ours: QA-LoRA at 4 bits beats QLoRA merged, then Q4_K_M", _against_what_is_shipped),
    ("ours: QA-LoRA+ at 4 bits is within 0.01 nats of 16-bit LoRA at equal parameters", _plus_reaches_lora),
    ("ours: QA-LoRA+ closes half of QA-LoRA's remaining gap at 3 and 2 bits", _plus_closes_half),
)
