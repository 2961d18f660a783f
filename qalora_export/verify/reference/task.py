"""The task score inside a proof: the same questions to every model of the line and, by its own loop, every runtime.

A whole test set through six ways of running a model would take longer than all gates together. So the first few of its
questions are asked (VerifySettings.scored), the same ones everywhere; the report says how many of how many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from qalora_runtimes.behaviour import Question

from qalora_export.checkpoint.manifest import parent_of
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.errors import RuntimeUnavailableError
from qalora_export.evaluation import answer_text, answers_of, end_ids, matches, questions, read_score
from qalora_export.models.loading import load_tokenizer
from qalora_export.recipe import EvaluateSettings
from qalora_export.safety import HashFile, sha256_bytes, sha256_file
from qalora_export.verify.reference.logits import PACKAGES, fixed_threads
from qalora_export.verify.store import Arrays, remembered


@dataclass(frozen=True, slots=True)
class Score:
    """Exact matches out of total."""

    exact: int
    total: int


@dataclass(frozen=True)
class Task:
    """The first questions of a data file, tokenized by the checkpoint, and the answers that are right.

    available: how many the settings speak of. ends: ids that are no part of an answer.
    """

    settings: EvaluateSettings
    prompts: tuple[tuple[int, ...], ...]
    expected: tuple[str, ...]
    available: int
    ends: frozenset[int]
    tokenizer: Any

    @property
    def questions(self) -> tuple[Question, ...]:
        return tuple(Question(prompt, self.settings.max_new_tokens) for prompt in self.prompts)

    def describe(self) -> str:
        count, name = len(self.prompts), Path(self.settings.data).name
        which = f"all {count}" if count == self.available else f"the first {count} of {self.available}"
        return f"exact greedy answers to {which} questions of {name}, at most {self.settings.max_new_tokens} tokens"

    def score(self, runtime: str, answers: Sequence[Mapping[str, Any]]) -> Score:
        """Of a runtime's answers: ids and, where it has a tokenizer, its own text. Raises RuntimeUnavailableError."""
        if len(answers) != len(self.prompts):
            raise RuntimeUnavailableError(f"{runtime} answered {len(answers)} of {len(self.prompts)} questions")
        texts = [answer_text(answer, self.tokenizer, self.ends) for answer in answers]
        return self.counted(
            [matches(text, want, self.settings.match) for text, want in zip(texts, self.expected, strict=True)]
        )

    def counted(self, right: Sequence[bool]) -> Score:
        """right: of each question."""
        return Score(sum(right), len(right))


def make_task(checkpoint: Path, settings: EvaluateSettings, most: int) -> Task:
    """most: how many questions are asked. Raises InputError as evaluation.questions does."""
    tokenizer = load_tokenizer(checkpoint)
    found = questions(tokenizer, settings, context=ModelFolder(checkpoint).context)
    asked = found[:most]
    return Task(
        settings,
        tuple(tuple(ids) for ids, _ in asked),
        tuple(record.expected() for _, record in asked),
        len(found),
        frozenset(end_ids(checkpoint, tokenizer)),
        tokenizer,
    )


def model_score(
    model: Path, written: Path, task: Task | None, *, threads: int, hash_of: HashFile = sha256_file
) -> Score | None:
    """Of a model folder in PyTorch. written: where `evaluate` leaves a score of it.

    With a task it is taken from there if it is of these questions and this very model, else computed (or what an
    earlier run computed: verify.store). Without one there is a score only if it was left for this very model.
    """
    if task is None:
        return recorded_score(model, written, hash_of=hash_of)
    right = _recorded(model, task, written, hash_of) if written.is_file() else None
    if right is None:
        right = _computed(model, task, threads)
    return task.counted(right)


def _recorded(model: Path, task: Task, path: Path, hash_of: HashFile) -> list[bool] | None:
    score, asked = read_score(path), task.settings
    same = {
        "model_sha256": parent_of(model, "checkpoint", hash_of=hash_of).sha256,
        "data_sha256": sha256_file(Path(asked.data)),
        "max_new_tokens": asked.max_new_tokens,
        "match": asked.match,
    }
    score.setdefault("match", "exact")  # scores of before there was a choice
    wrong = score.get("wrong")
    if any(score.get(key) != value for key, value in same.items()) or not isinstance(wrong, list):
        return None
    if score["total"] < len(task.prompts) or score["total"] - score["exact"] != len(wrong):
        return None
    return [index not in wrong for index in range(len(task.prompts))]


def _computed(model: Path, task: Task, threads: int) -> list[bool]:
    def compute() -> Arrays:
        with fixed_threads(threads):
            answers = answers_of(model, task.tokenizer, [[*prompt] for prompt in task.prompts], task.settings)
        right = [
            matches(answer, want, task.settings.match) for answer, want in zip(answers, task.expected, strict=True)
        ]
        return {"right": np.array(right, np.bool_)}

    how = task.settings
    asked = repr((task.prompts, task.expected, how.max_new_tokens, how.batch_size, how.match))
    found = remembered(
        "task score",
        compute,
        of=model,
        packages=(*PACKAGES, "tokenizers"),
        task=sha256_bytes(asked.encode()),
        threads=threads,
    )
    return [bool(right) for right in found["right"]]


def recorded_score(model: Path, path: Path, *, hash_of: HashFile = sha256_file) -> Score | None:
    """What `evaluate` wrote to `path`, where it speaks of this very model."""
    if not path.is_file():
        return None
    score = read_score(path)
    same = score.get("model_sha256") == parent_of(model, "checkpoint", hash_of=hash_of).sha256
    return Score(score["exact"], score["total"]) if same else None
