"""The task score of a proof: the same first questions everywhere, counted from what was really answered."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qalora_export.checkpoint.manifest import parent_of
from qalora_export.errors import InputError, RuntimeUnavailableError
from qalora_export.evaluation import evaluate
from qalora_export.models.loading import load_tokenizer
from qalora_export.recipe import EvaluateSettings
from qalora_export.verify.reference import task as task_module
from qalora_export.verify.reference.task import Score, Task, make_task, model_score

TOKENS = 5
QUESTIONS = ("light on", "light off", "a longer question", "last")


def data_of(folder: Path, answers: tuple[str, ...]) -> EvaluateSettings:
    lines = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in zip(QUESTIONS, answers, strict=True)
    ]
    path = folder / "test.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return EvaluateSettings(data=str(path), max_new_tokens=TOKENS)


@pytest.fixture
def settings(tiny_canonical: Path, tmp_path: Path) -> EvaluateSettings:
    """What the model answers is the expected answer to the first and the third question, and to no other."""
    asked = data_of(tmp_path, ("none",) * 4)
    report = evaluate(tiny_canonical, asked)
    assert report.wrong == (0, 1, 2, 3)
    own = [miss.answer for miss in report.misses]
    return data_of(tmp_path, (own[0], "none", own[2], "none"))


def test_the_first_questions_are_asked_of_the_model(tiny_canonical: Path, settings: EvaluateSettings) -> None:
    task = make_task(tiny_canonical, settings, 3)
    assert (len(task.prompts), task.available, len(task.questions)) == (3, 4, 3)
    assert "the first 3 of 4 questions of test.jsonl" in task.describe()
    assert model_score(tiny_canonical, Path("nowhere.json"), task, threads=1) == Score(2, 3)
    everything = make_task(tiny_canonical, settings, 9)
    assert "all 4 questions" in everything.describe()
    assert model_score(tiny_canonical, Path("nowhere.json"), everything, threads=1) == Score(2, 4)


def test_a_score_that_was_written_counts_where_it_is_of_these_questions(
    tiny_canonical: Path, settings: EvaluateSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, path = make_task(tiny_canonical, settings, 3), tmp_path / "score.json"
    evaluate(tiny_canonical, settings, path)
    monkeypatch.setattr(task_module, "_computed", lambda *_: [False] * 3)
    assert model_score(tiny_canonical, path, task, threads=1) == Score(2, 3)
    written = json.loads(path.read_text())
    assert written["wrong"] == [1, 3]
    for other in ({"data_sha256": "0" * 64}, {"max_new_tokens": 6}, {"model_sha256": "0" * 64}, {"wrong": None}):
        path.write_text(json.dumps(written | other))
        assert model_score(tiny_canonical, path, task, threads=1) == Score(0, 3), other


def test_without_a_task_only_a_written_score_counts(tiny_canonical: Path, tmp_path: Path) -> None:
    path = tmp_path / "score.json"
    assert model_score(tiny_canonical, path, None, threads=1) is None
    score = {"exact": 3, "total": 4, "accuracy": 0.75}
    path.write_text(json.dumps(score))
    assert model_score(tiny_canonical, path, None, threads=1) is None  # of an unknown model
    path.write_text(json.dumps(score | {"model_sha256": parent_of(tiny_canonical, "checkpoint").sha256}))
    assert model_score(tiny_canonical, path, None, threads=1) == Score(3, 4)


def test_a_runtime_is_judged_by_its_own_text_and_by_its_ids_where_it_has_none(tiny_canonical: Path) -> None:
    tokenizer = load_tokenizer(tiny_canonical)
    ids = tokenizer("on", add_special_tokens=False)["input_ids"]
    end = int(tokenizer.eos_token_id)
    asked = EvaluateSettings(data="test.jsonl")
    task = Task(asked, ((1,), (2,), (3,)), ("on", "on", "on"), 3, frozenset({end}), tokenizer)
    answers = [{"tokens": [], "text": " on\n"}, {"tokens": [*ids, end], "text": None}, {"tokens": ids, "text": "off"}]
    assert task.score("llama.cpp", answers) == Score(2, 3)
    assert replace(task, expected=("on", "off", "off")).score("llama.cpp", answers) == Score(2, 3)
    with pytest.raises(RuntimeUnavailableError, match="2 of 3"):
        task.score("llama.cpp", answers[:2])


def test_a_question_that_leaves_no_room_is_refused(tiny_canonical: Path, settings: EvaluateSettings) -> None:
    with pytest.raises(InputError, match="do not fit"):
        make_task(tiny_canonical, settings.model_copy(update={"max_new_tokens": 10**6}), 3)
