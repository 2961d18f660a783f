"""Which sequences and questions share a step."""

from __future__ import annotations

from qalora_runtimes.behaviour import Question
from qalora_runtimes.protocol import make_job
from qalora_runtimes.side_by_side import SIDE_BY_SIDE, groups_of, questions_together, steps_of


def test_groups_stay_within_their_cells_and_hold_every_sequence_once() -> None:
    job = make_job([[1] * length for length in (5, 9, 1, 2, 8, 1)], "both")
    assert groups_of(job, job.longest) == [[1], [4], [0, 3, 2, 5]]
    assert groups_of(job, 4) == [[1], [4], [0], [3, 2, 5]]  # a sequence that is longer is run all the same
    assert groups_of(make_job(job.sequences, "prefill"), 100) == []
    many = groups_of(make_job([[1] * 100, *[[1]] * 40], "decode"), 100)
    assert [len(group) for group in many] == [1, SIDE_BY_SIDE, SIDE_BY_SIDE, 8]


def test_steps_take_every_token_of_a_group_in_its_place() -> None:
    job = make_job([[1, 2], [3, 4, 5], [6], [7]], "decode")
    taken = list(steps_of(job, [1, 0, 2]))
    assert taken == [(0, [3, 1, 6], [2, 0, 5]), (1, [4, 2], [3, 1]), (2, [5], [4])]


def test_questions_share_what_there_is() -> None:
    questions = [Question((1,) * length, 2) for length in (1, 3, 9, 1, 1)]
    together = [[len(q.prompt) for q in group] for group in questions_together(questions, 8)]
    assert together == [[1, 3], [9], [1, 1]]
    padded = [[len(q.prompt) for q in group] for group in questions_together(questions, 8, padded=True)]
    assert padded == [[1], [3], [9], [1, 1]]
    assert [len(group) for group in questions_together(questions, 100, most=2)] == [2, 2, 1]
