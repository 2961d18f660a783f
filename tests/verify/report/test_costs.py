"""The table of costs: every model and path has a row, in order, and what is missing says so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from qalora_export.cli.parity_table import cost_table as shown_table
from qalora_export.console import console
from qalora_export.errors import RuntimeUnavailableError
from qalora_export.verify.metrics import position_metrics
from qalora_export.verify.probes.probe_set import ProbeSet
from qalora_export.verify.reference.lineage import Member
from qalora_export.verify.reference.task import Score
from qalora_export.verify.report import costs
from qalora_export.verify.report.costs import NOT_RUN, WANTED, cost_table

FOLLOWING = np.array([1, 2, 3, -1, 1, 2, 3, -1], np.int32)
PROBES = ProbeSet(np.zeros(8, np.int32), np.array([4, 4], np.int32), ("random ids", "unicode"))


SCORES = {"exact": Score(8, 9), "shipped": Score(7, 9)}


def not_there(path: str) -> Score:
    raise RuntimeUnavailableError("onnxruntime is not installed")


def logprobs(seed: int) -> np.ndarray:
    return np.log(np.random.default_rng(seed).dirichlet(np.ones(6), 8)).astype(np.float32)


def changed(before: int, after: int, *, bad: bool = False):
    there = logprobs(after)
    if bad:
        there[0, 0] = np.nan
    return position_metrics(logprobs(before), there, FOLLOWING)


def table(
    monkeypatch: pytest.MonkeyPatch, members: list[Member], kind: str = "merged", *, bad: bool = False, task: Any = None
):
    monkeypatch.setattr(costs, "kind_of", lambda _: kind)
    session = SimpleNamespace(
        probes=PROBES, lineage=members, checkpoint=SimpleNamespace(path="merged.qalora"), task=task
    )
    positions = {"exact": changed(2, 2), "shipped": changed(2, 3, bad=bad)}
    ran = SimpleNamespace(name="llama.cpp", session=session, positions=positions, score=SCORES.get)
    missing = SimpleNamespace(name="onnxruntime", session=session, positions={}, score=not_there)
    return cost_table(cast(Any, session), cast(Any, [ran, missing]))


def line() -> list[Member]:
    first, second = changed(0, 1), changed(1, 2)
    return [
        Member("original", "m", next=first.next_reference, score=Score(1, 9)),
        Member("base", "b", next=first.next_runtime, change=first),
        Member("checkpoint", "c", next=second.next_runtime, change=second, score=Score(8, 9)),
    ]


def test_rows_go_from_the_original_to_what_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table(monkeypatch, line())
    assert [(row.model, row.against) for row in rows] == [
        ("original model", ""),
        ("quantized base", "original model"),
        ("fine-tuned", "quantized base"),
        ("llama.cpp, exact path", "fine-tuned"),
        ("llama.cpp, shipped path", "fine-tuned"),
        ("onnxruntime, exact path", "fine-tuned"),
        ("onnxruntime, shipped path", "fine-tuned"),
    ]
    text = slice(4, 7)  # the positions of the second sequence that have a next token
    for row, seed in zip(rows, (0, 1, 2, 2, 3), strict=False):
        want = -logprobs(seed)[np.arange(8), FOLLOWING][text].mean()
        assert row.loss == pytest.approx(float(want), rel=1e-5)
    assert rows[1].kl == pytest.approx(changed(0, 1).kl.mean())
    assert rows[1].kl_text == pytest.approx(changed(0, 1).kl[4:].mean())
    assert rows[4].top1_text == changed(2, 3).agree[4:].mean()
    assert rows[3].kl == 0 and rows[2].note == WANTED
    assert [row.note for row in rows[5:]] == [NOT_RUN] * 2 and rows[5].loss is None


def test_what_is_not_at_hand_is_shown_and_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    members = [Member("original", "", "away"), Member("base", "", "gone"), line()[2]]
    members[2] = Member("checkpoint", "c", next=line()[2].next)
    rows = table(monkeypatch, members)
    assert (rows[0].note, rows[1].note, rows[1].kl, rows[2].kl) == ("away", "gone", None, None)
    with console.capture() as captured:
        console.print(shown_table(rows))
    assert captured.get().count("not at hand") == 19


def test_the_task_score_is_of_each_path_and_what_was_not_answered_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table(monkeypatch, line(), task=object())
    assert [row.score for row in rows[3:]] == [Score(8, 9), Score(7, 9), None, None]
    assert rows[3].note == "" and rows[5].note == f"{NOT_RUN}; the task was not answered (onnxruntime is not installed)"
    assert [row.score for row in table(monkeypatch, line())[3:]] == [None] * 4


def test_a_nan_makes_a_cost_infinite(monkeypatch: pytest.MonkeyPatch) -> None:
    row = table(monkeypatch, line(), bad=True)[4]
    assert row.kl == float("inf") and row.kl_text == pytest.approx(changed(2, 3).kl[4:].mean())


@pytest.mark.parametrize(("kind", "name"), [("base", "quantized base"), ("", "checkpoint")])
def test_a_checkpoint_is_called_what_it_is(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table(monkeypatch, [line()[0], line()[2]], kind)
    assert (rows[1].model, rows[1].against, rows[2].against) == (name, "original model", name)
