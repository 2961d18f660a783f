"""Greedy answers on ONNX Runtime's KV cache. It has no loop of its own: this is what a host does that takes the end
tokens and sampling settings from the folder's generation_config.json, as transformers.js does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from qalora_runtimes import heartbeat
from qalora_runtimes.behaviour import ASKED, END, LIMIT, QUESTIONS, Request, prompt_of
from qalora_runtimes.scoring import Rows, RunnerError

Cache = dict[str, Any]
Run = Callable[[Any, Any, Cache], tuple[Rows, Cache]]


class Behaviour:
    """behaviour.ANSWER_KEYS. run: (ids (rows, n), mask (rows, past + n), cache) -> logits (rows, n, vocab), cache."""

    def __init__(self, folder: Path, run: Run, empty: Callable[[int], Cache], request: Request) -> None:
        self._run, self._empty, self._request = run, empty, request
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
        answers = list[dict[str, Any]]()
        for index, question in enumerate(self._request.scored):
            heartbeat.at(QUESTIONS, index, len(self._request.scored))
            made, _ = self._greedy([*question.prompt], 0, self._empty(1), question.tokens)
            answers.append({"tokens": made, "text": None})
        return answers

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
            if made[-1] in self._ends or len(made) == tokens:
                return made, cache
            fresh = made[-1:]

    def _stop(self, made: list[int], tokens: int) -> str:
        return END if made[-1] in self._ends else ASKED if len(made) == tokens else LIMIT

    def _batch(self) -> list[list[int]] | None:
        """All prompts at once, the shorter ones padded on the right and masked there."""
        prompts = self._request.batch
        if len(prompts) < 2:
            return None
        lengths = np.array([len(row) for row in prompts])
        padded = np.array([[*row, *[0] * (lengths.max() - len(row))] for row in prompts])
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        rows, cache = self._run(padded, mask, self._empty(len(prompts)))
        last = rows[np.arange(len(prompts)), lengths - 1]
        made: list[list[int]] = [[] for _ in prompts]
        for _ in range(self._request.questions[0].tokens):
            chosen = np.argmax(last, axis=-1)
            for row, token in zip(made, chosen, strict=True):
                if not row or row[-1] not in self._ends:
                    row.append(int(token))
            mask = np.concatenate([mask, np.ones((len(prompts), 1), np.int64)], axis=1)
            rows, cache = self._run(chosen[:, None], mask, cache)
            last = rows[:, -1]
        return made


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
