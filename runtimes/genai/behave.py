"""What ONNX Runtime GenAI generates on its own genai_config.json: its loop, its end tokens, its text stream."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qalora_runtimes import heartbeat
from qalora_runtimes.behaviour import ASKED, END, LIMIT, QUESTIONS, Request, prompt_of
from qalora_runtimes.scoring import RunnerError
from qalora_runtimes.side_by_side import POSITIONS, SIDE_BY_SIDE, questions_together

# Asked for only where the defaults that ship draw at random: then no two answers are alike.
GREEDY = {"do_sample": False, "top_k": 1, "temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0}
SURE = 1e4  # a logit beside which no other counts


class Behaviour:
    """behaviour.ANSWER_KEYS by a module onnxruntime_genai and a model of it.

    together: a task's questions are answered side by side.
    """

    def __init__(self, genai: Any, model: Any, request: Request, *, together: bool = False) -> None:
        self._genai, self._model, self._request = genai, model, request
        self._most = SIDE_BY_SIDE if together else 1
        try:
            self._tokenizer = genai.Tokenizer(model)
        except RuntimeError as error:
            raise RunnerError(f"ONNX Runtime GenAI cannot load the tokenizer: {error}") from error
        self._defaults = dict(genai.GeneratorParams(model).get_search_options())
        self._errors: list[str] = []

    def answers(self) -> dict[str, Any]:
        try:
            return {
                "answers": self._answers(),
                "batch": self._batch(),
                "ends": {"all": [int(end) for end in self._tokenizer.eos_token_ids], "forced": self._forced()},
                "pieces": self._pieces(),
                "decoded": [self._stream(row) for row in self._request.sequences],
                "unprompted": [self._rendered(chat) for chat in self._request.unprompted],
                "scored": self._scored(),
                "defaults": self._defaults,
                "errors": self._errors,
            }
        except RuntimeError as error:
            raise RunnerError(f"ONNX Runtime GenAI cannot generate: {error}") from error

    def _generator(self, batch: int = 1, longest: int | None = None) -> Any:
        """On the defaults that ship, but for a cache that is no longer than what is asked needs."""
        options: dict[str, Any] = dict(GREEDY) if self._request.sampled else {}
        needed = (longest or self._request.longest) + 1
        if needed < self._defaults["max_length"]:
            options["max_length"] = needed
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(batch_size=batch, **options)
        return self._genai.Generator(self._model, parameters)

    def _answers(self) -> list[dict[str, Any]]:
        answers, before, generator = list[dict[str, Any]](), list[int](), None
        for index, question in enumerate(self._request.questions):
            heartbeat.at("answers", index, len(self._request.questions))
            ids = prompt_of(question, before, answers[-1]["tokens"] if answers else [])
            if not question.continues:
                generator = self._generator()
            try:
                cut = question.continues and answers[-1]["stop"] != END
                answers.append(self._answer(generator, ids, question.tokens, cut=cut))
            except RuntimeError as error:  # its own default length does not hold the prompt
                self._errors.append(f"question {index}: {error}")
                answers.append({"tokens": [], "stop": LIMIT, "text": "", "cached": 0, "chat": None})
            before = ids
        return answers

    def _scored(self) -> list[dict[str, Any]]:
        answers, ends = list[dict[str, Any]](), set(self._tokenizer.eos_token_ids)
        asked = self._request.scored
        for group in questions_together(asked, POSITIONS, most=self._most, padded=True):
            heartbeat.at(QUESTIONS, len(answers), len(asked))
            if len(group) > 1:
                found = self._together([q.prompt for q in group], [q.tokens for q in group])
            else:
                found = [self._answer(self._generator(), [*q.prompt], q.tokens, cut=False)["tokens"] for q in group]
            for made in found:
                shown = made[:-1] if made and made[-1] in ends else made
                answers.append({"tokens": made, "text": self._stream(shown)})
        return answers

    def _answer(self, generator: Any, ids: list[int], tokens: int, *, cut: bool) -> dict[str, Any]:
        """`generator` holds a beginning of `ids`. cut: behind an answer that no end token ended.

        The last token of such an answer is in GenAI's sequence and not in its cache, and append_tokens does not make up
        for it (0.18); so it is taken back and run with what follows.
        """
        cached = int(generator.token_count())
        if cut and cached:
            cached -= 1
            generator.rewind_to(cached)
        _append(generator, ids[cached:])
        made: list[int] = []
        while len(made) < tokens and not generator.is_done():
            generator.generate_next_token()
            made += [int(token) for token in generator.get_next_tokens()]
            heartbeat.advance()
        ended = bool(made) and generator.is_done() and made[-1] in self._tokenizer.eos_token_ids
        stop = END if ended else ASKED if len(made) == tokens else LIMIT
        return {"tokens": made, "stop": stop, "text": self._stream(made), "cached": cached, "chat": None}

    def _batch(self) -> list[list[int]] | None:
        prompts = self._request.batch
        if len(prompts) < 2:
            return None
        try:
            return self._together(prompts, [self._request.questions[0].tokens] * len(prompts))
        except RuntimeError as error:
            self._errors.append(f"batch: {error}")
            return [[] for _ in prompts]

    def _together(self, prompts: Sequence[Sequence[int]], most: Sequence[int]) -> list[list[int]]:
        """Greedy answers to all prompts at once, the shorter ones padded as GenAI's own encode_batch pads them; up to
        and with an end token, and no more than `most` tokens each.
        """
        longest, padding = max(map(len, prompts)), int(self._tokenizer.pad_token_id)
        rows = np.array([[*row, *[padding] * (longest - len(row))] for row in prompts], np.int32)
        generator, ends = self._generator(len(rows), longest + max(most)), set(self._tokenizer.eos_token_ids)
        generator.append_tokens(rows)
        made: list[list[int]] = [[] for _ in rows]
        for _ in range(max(most)):
            if generator.is_done():
                break
            generator.generate_next_token()
            heartbeat.advance()
            for row, limit, token in zip(made, most, generator.get_next_tokens(), strict=True):
                if len(row) < limit and not (row and row[-1] in ends):
                    row.append(int(token))
        return made

    def _forced(self) -> dict[str, str]:
        """What happens when each end token is the next one, behind the first question."""
        return {str(end): self._force(end) for end in self._request.ends}

    def _force(self, end: int) -> str:
        generator = self._generator()
        try:
            _append(generator, [*self._request.questions[0].prompt])
        except RuntimeError as error:
            return str(error)
        logits = np.full_like(np.asarray(generator.get_logits(), np.float32), -SURE)
        logits[..., end] = SURE
        generator.set_logits(logits)
        generator.generate_next_token()
        came = [int(token) for token in generator.get_next_tokens()]
        return (END if generator.is_done() else ASKED) if came == [end] else f"{came} came instead"

    def _pieces(self) -> dict[str, list[str] | None]:
        """Special tokens hidden, as it ships; told to show them, GenAI still hides some of SentencePiece's."""
        anchor, count = self._request.anchor, self._request.vocabulary
        rows = (np.array([anchor, index, anchor], np.int32) for index in range(count))
        return {"hidden": [self._tokenizer.decode(row) for row in rows], "shown": None}

    def _stream(self, ids: Iterable[int]) -> str:
        stream = self._tokenizer.create_stream()
        return "".join(stream.decode(int(token)) for token in ids)

    def _rendered(self, chat: Mapping[str, Any]) -> str | None:
        try:
            parts = {key: json.dumps(value, ensure_ascii=False) for key, value in chat.items()}
            return str(self._tokenizer.apply_chat_template(**parts, add_generation_prompt=False))
        except RuntimeError as error:
            self._errors.append(f"template without a generation prompt: {error}")
            return None


def _append(generator: Any, ids: list[int]) -> None:
    tokens: NDArray[np.int32] = np.array(ids, np.int32)
    generator.append_tokens(tokens)
