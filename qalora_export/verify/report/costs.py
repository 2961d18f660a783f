"""What each step from the original model to what ships costs, absolutely: the table that every report begins with.

    original model → quantized base → fine-tuned → exact path and shipped path of each runtime

KL(before‖after) and first choices are over all positions of the probe set, as the bounds of gate G3 are, and over its
text alone (metrics: kl_text, top1_text); the loss is −ln p of the token that follows, the mean over the text. The task
score is of the same questions everywhere (reference/task.py), answered by PyTorch and by each runtime's own loop. What
quantization and the exact path change should be little, what fine-tuning changes is what it is for: its loss and the
task score tell whether it is for the better.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.provenance import kind_of
from qalora_export.errors import RuntimeUnavailableError
from qalora_export.verify.metrics import PositionMetrics
from qalora_export.verify.reference.lineage import Member
from qalora_export.verify.reference.task import Score
from qalora_export.verify.session import Session
from qalora_export.verify.target import RunPath, Target

ORIGINAL, BASE, TUNED, PLAIN = "original model", "quantized base", "fine-tuned", "checkpoint"
WANTED = "what fine-tuning is for"
PATHS: tuple[tuple[RunPath, str], ...] = (("exact", "exact path"), ("shipped", "shipped path"))
NOT_RUN = "it was not measured"


@dataclass(frozen=True, slots=True)
class Cost:
    """One row. against: the model that kl and top1 are measured against; "" for the first.

    kl, kl_text, loss: nats, inf where a runtime gave NaN; top1, top1_text: shares of positions. None: not at hand, and
    note says why.
    """

    model: str
    against: str
    kl: float | None = None
    kl_text: float | None = None
    top1: float | None = None
    top1_text: float | None = None
    loss: float | None = None
    score: Score | None = None
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def cost_table(session: Session, targets: Iterable[Target]) -> list[Cost]:
    """Every model of the line, then every runtime."""
    text = session.probes.text
    names = {"original": ORIGINAL, "base": BASE, "checkpoint": _name(session)}
    rows, before = list[Cost](), ""
    for member in session.lineage:
        rows.append(_of_member(member, names[member.role], before, text))
        before = names[member.role]
    return [*rows, *(row for target in targets for row in _of_runtime(target, before, text))]


def _name(session: Session) -> str:
    return {"base": BASE, "merged": TUNED}.get(kind_of(session.checkpoint.path), PLAIN)


def _of_member(member: Member, name: str, before: str, text: NDArray[np.bool_]) -> Cost:
    loss = None if member.next is None else _loss(member.next, text)
    note = member.note or (WANTED if name == TUNED else "")
    return Cost(name, before, **_change(member.change, text), loss=loss, score=member.score, note=note)


def _of_runtime(target: Target, reference: str, text: NDArray[np.bool_]) -> Iterator[Cost]:
    for path, label in PATHS:
        measured = target.positions.get(path)
        loss = None if measured is None else _loss(measured.next_runtime, text)
        score, why = _score(target, path)
        note = "; ".join(part for part in ("" if measured else NOT_RUN, why) if part)
        change = _change(measured, text)
        yield Cost(f"{target.name}, {label}", reference, **change, loss=loss, score=score, note=note)


def _score(target: Target, path: RunPath) -> tuple[Score | None, str]:
    """Of the task, where there is one; why there is none in spite of it."""
    if target.session.task is None:
        return None, ""
    try:
        return target.score(path), ""
    except RuntimeUnavailableError as error:
        return None, f"the task was not answered ({error.reason})"


def _change(measured: PositionMetrics | None, text: NDArray[np.bool_]) -> dict[str, Any]:
    if measured is None:
        return {}
    figures = {"kl": _kl(measured, slice(None)), "top1": float(measured.agree.mean())}
    if text.any():
        figures |= {"kl_text": _kl(measured, text), "top1_text": float(measured.agree[text].mean())}
    return figures


def _kl(measured: PositionMetrics, rows: NDArray[np.bool_] | slice) -> float:
    return float("inf") if measured.bad[rows].any() else float(measured.kl[rows].mean())


def _loss(following: NDArray[np.float64], text: NDArray[np.bool_]) -> float | None:
    """following: ln p of the next token, NaN where there is none."""
    values = following[text & ~np.isnan(following)]
    return float(-values.mean()) if values.size else None
