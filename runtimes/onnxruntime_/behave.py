"""Greedy answers on ONNX Runtime's KV cache. It has no loop of its own: this is what a host does that takes the end
tokens and sampling settings from the folder's generation_config.json, as transformers.js does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from qalora_runtimes import heartbeat
from qalora_runtimes.behaviour import ASKED, END, LIMIT, QUESTIONS, Request, prompt_of
from qalora_runtimes.scoring import Rows, RunnerError
from qalora_runtimes.side_by_side import POSITIONS, SIDE_BY_SIDE, questions_together

Cache = dict[str, Any]
Run = Callable[[Any, Any, Cache], tuple[Rows, Cache]]


class Behaviour:
    """behaviour.ANSWER_KEYS. run: (ids (rows, n), mask (rows, past + n), cache) -> logits (rows, n, vocab), cache.

    together: a task's questions are answered side by side.
    """

    def __init__(
        self, folder: Path, run: Run, empty: Callable[[int], Cache], request: Request, *, together: bool = False
    ) -> None:
        self._run, self._empty, self._request = run, empty, request
        self._most = SIDE_BY_SIDE if together else 1
        self._settings = _settings(folder)
        ends = self._settings.get("eos_token_id")
        self._ends = [] if ends is None else ends if isinstance(ends, list) else [ends]

    def answers(self) -> dict[str, Any]:
        return {
            "answers": self._answers(),
            "batch": self._batch(),
            "ends": {"all": self._ends, "forced": {str(end): self._stop([end], 1) for end in self._request.ends}},
            "pieces": None,
            "decoded": None,
            "unprompted": [None for _ in self._request.unprompted],
            "scored": self._scored(),
            "defaults": self._settings,
            "errors": [],
        }

    def _answers(self) -> list[dict[str, Any]]:
        answers, before = list[dict[str, Any]](), list[int]()
        cache, held = self._empty(1), 0  # tokens whose keys and values are in the cache
        for index, question in enumerate(self._request.questions):
            heartbeat.at("answers", index, len(self._request.questions))
            ids = prompt_of(question, before, answers[-1]["tokens"] if answers else [])
            if not question.continues:
                cache, held = self._empty(1), 0
            made, cache = self._greedy(ids[held:], held, cache, question.tokens)
            stop = self._stop(made, question.tokens)
            answers.append({"tokens": made, "stop": stop, "text": None, "cached": held, "chat": None})
            before, held = ids, len(ids) + len(made) - 1
        return answers

    def _scored(self) -> list[dict[str, Any]]:
        asked, made = self._request.scored, list[list[int]]()
        for group in questions_together(asked, POSITIONS, most=self._most, padded=True):
            heartbeat.at(QUESTIONS, len(made), len(asked))
            if len(group) > 1:
                made += self._together([q.prompt for q in group], [q.tokens for q in group])
            else:
                made.append(self._greedy([*group[0].prompt], 0, self._empty(1), group[0].tokens)[0])
        return [{"tokens": tokens, "text": None} for tokens in made]

    def _greedy(self, fresh: list[int], held: int, cache: Cache, tokens: int) -> tuple[list[int], Cache]:
        """The likeliest token again and again behind `held` tokens in `cache` and `fresh` ones, up to and with an end
        token; all but the last are in the cache then.
        """
        made = list[int]()
        while True:
            held += len(fresh)
            rows, cache = self._run(np.array([fresh]), np.ones((1, held)), cache)
            made.append(int(np.argmax(rows[0, -1])))
            heartbeat.advance()
            if self._ended(made, tokens):
                return made, cache
            fresh = made[-1:]

    def _stop(self, made: list[int], tokens: int) -> str:
        return END if made[-1] in self._ends else ASKED if len(made) == tokens else LIMIT

    def _batch(self) -> list[list[int]] | None:
        prompts = self._request.batch
        if len(prompts) < 2:
            return None
        return self._together(prompts, [self._request.questions[0].tokens] * len(prompts))

    def _together(self, prompts: Sequence[Sequence[int]], most: Sequence[int]) -> list[list[int]]:
        """Greedy answers to all prompts at once, the shorter ones padded on the right and masked there; up to and with
        an end token, and no more than `most` tokens each.
        """
        lengths = np.array([len(row) for row in prompts])
        padded = np.array([[*row, *[0] * (lengths.max() - len(row))] for row in prompts])
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        rows, cache = self._run(padded, mask, self._empty(len(prompts)))
        last = rows[np.arange(len(prompts)), lengths - 1]
        made: list[list[int]] = [[] for _ in prompts]
        while True:
            chosen = np.argmax(last, axis=-1)
            for row, token, limit in zip(made, chosen, most, strict=True):
                if not self._ended(row, limit):
                    row.append(int(token))
            if all(self._ended(row, limit) for row, limit in zip(made, most, strict=True)):
                return made
            heartbeat.advance()
            mask = np.concatenate([mask, np.ones((len(prompts), 1), np.int64)], axis=1)
            rows, cache = self._run(chosen[:, None], mask, cache)
            last = rows[:, -1]

    def _ended(self, made: Sequence[int], most: int) -> bool:
        return len(made) == most or (len(made) > 0 and made[-1] in self._ends)


def _settings(folder: Path) -> dict[str, Any]:
    """generation_config.json; where a folder has none, as earlier versions wrote it, the ids of genai_config.json."""
    path = folder / "generation_config.json"
    try:
        if not path.exists():
            found = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
            return {"eos_token_id": found.get("eos_token_id")}
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunnerError(f"{folder} says nothing usable about generation: {error!r}") from error
    if not isinstance(found, dict):
        raise RunnerError(f"{path} is no table")
    return found
