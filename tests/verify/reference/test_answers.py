"""Near-ties of greedy answers: by what int8 rounding does to that very margin, in many draws."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from qalora_export.verify.reference import answers as module
from qalora_export.verify.reference.answers import DRAWN, DRAWS, NEAR, Answer, Deviation, GreedyReference, noise
from qalora_export.verify.reference.logits import round_to_int8
from qalora_export.verify.store import Store, kept_in
from tests.verify.exports import Exported


@pytest.fixture
def reference(exported: Exported) -> GreedyReference:
    return GreedyReference(exported.checkpoint, 1)


def greedy(reference: GreedyReference, length: int) -> Answer:
    """What the reference itself writes behind a prompt, found a token at a time."""
    tokens: list[int] = []
    for _ in range(length):
        answer = Answer("a", (1, 2, 3), (*tokens, 0))
        (rows,) = reference._logprobs([(answer, answer.kept)])
        tokens.append(int(np.argmax(rows[-1])))
    return Answer("a", (1, 2, 3), tuple(tokens))


def test_its_own_answer_has_no_deviation_and_a_far_token_is_one(reference: GreedyReference) -> None:
    right = greedy(reference, 6)
    assert reference.deviations([right]) == []
    (rows,) = reference._logprobs([(right, right.kept)])
    least = int(np.argmin(rows[3]))
    wrong = dataclasses.replace(right, tokens=(*right.tokens[:3], least))
    (found,) = reference.deviations([wrong])
    assert (found.index, found.token, found.wanted) == (3, least, right.tokens[3])
    assert found.margin == pytest.approx(float(rows[3].max() - rows[3].min()), rel=1e-5)
    assert found.margin > NEAR * found.spread and not found.near(1.0)


def test_the_spread_is_that_of_the_margin_over_all_draws(reference: GreedyReference) -> None:
    right = greedy(reference, 2)
    wrong = dataclasses.replace(right, tokens=(right.tokens[0], (right.tokens[1] + 1) % 100))
    (found,) = reference.deviations([wrong])
    (exact,) = reference._logprobs([(wrong, wrong.kept[1:])])
    draws = reference._draws([(wrong, wrong.kept[1:])])
    change = np.array([draw[0] - exact[0] for draw in draws], np.float64)
    margin = change[:, found.wanted] - change[:, found.token]
    slow = max(np.sqrt((margin**2).mean()), np.sqrt(2 * change.var(axis=1).mean()))
    assert found.spread == pytest.approx(slow, rel=1e-5)
    assert len({draw.tobytes() for draw in draws}) == DRAWS  # every draw is another
    again = reference._draws([(wrong, wrong.kept[1:])])
    assert np.array_equal(draws, again)  # in every run


def test_of_many_other_tokens_those_with_the_largest_margins_are_drawn(
    reference: GreedyReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    right = module.LayerwiseModel.copies

    def copies(self: object, sequences: list[np.ndarray], count: int, *, kept: list[np.ndarray]) -> object:
        asked.append((kept, count))
        return right(self, sequences, count, kept=kept)

    monkeypatch.setattr(module.LayerwiseModel, "copies", copies)
    found = reference.deviations([Answer("a", (1, 2, 3), tuple(range(5, 25)))])
    margins = sorted((d.margin for d in found), reverse=True)
    (((places,), count),) = asked
    assert len(found) > DRAWN and count == DRAWS and len(places) == DRAWN
    drawn = [d for d in found if d.index + 2 in places]
    assert sorted((d.margin for d in drawn), reverse=True) == margins[:DRAWN]
    assert {d.spread for d in found} == {d.spread for d in drawn}


def test_a_shipped_path_that_costs_more_may_turn_over_more() -> None:
    tie = Deviation("a", 0, 1, 2, margin=1.0, spread=0.1)
    assert not tie.near(1.0) and tie.near(2.0) and not dataclasses.replace(tie, margin=1.9).near(100.0)


def test_noise_is_int8_rounding_of_what_float16_may_disturb() -> None:
    import torch

    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    step = x.abs().reshape(4, 2, 32).amax(-1, keepdim=True) / 127
    moved = (noise()(x) - round_to_int8(x)).reshape(4, 2, 32).abs()
    assert (moved <= 1.01 * step).all() and moved.any()


def test_what_was_judged_before_is_kept_to_the_bit(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [Answer("a", (1, 2, 3), (5, 6, 7)), Answer("b", (4, 5), ()), Answer("c", (6, 7), (8, 9))]
    store = Store(tmp_path / "store")
    with kept_in(store):
        first = GreedyReference(exported.checkpoint, 1).deviations(answers)
        monkeypatch.setattr(module, "LayerwiseModel", None)  # no model is needed any more
        assert GreedyReference(exported.checkpoint, 1).deviations(answers) == first
    assert store.answered == ["greedy answers"]
    assert {deviation.name for deviation in first} == {"a", "c"}
    assert all(isinstance(d.token, int) and d.spread > 0 for d in first)
