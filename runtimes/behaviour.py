"""What a runtime is asked to do as its users have it do it: generate with the defaults that ship, stop, decode.

A request and its answers are JSON inside job.npz and logits.npz (qalora_runtimes.protocol).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

END, ASKED, LIMIT = "end", "asked", "limit"  # why an answer ended: an end token; all tokens asked for; anything else
QUESTIONS = "questions of the task"  # what a runner counts while it answers `scored` (heartbeat)
ANSWER_KEYS = {
    "answers": "one object per question: tokens, the ids generated, an end token included; stop, one of the above; "
    "text, as the runtime shows it, null where it has no tokenizer; cached, tokens that were in the cache before; "
    "chat, {text, stop} of the runtime's own chat completion, null where it has none",
    "batch": "ids generated for each prompt of the batch, up to and with an end token; null where there are no batches",
    "ends": "{all: ids at which the runtime says generation ends, null if it does not say; forced: {id: stop}, what "
    "happened when that id was made the next token}",
    "pieces": "{hidden, shown: the text of anchor, id, anchor for every id, special tokens hidden or shown; null where "
    "there is no tokenizer or no such way}",
    "decoded": "text of each of the request's sequences, special tokens hidden; null where there is no tokenizer",
    "unprompted": "each of those chats rendered without a generation prompt; null where it failed or cannot be asked",
    "scored": "one object per question of the task: tokens, the ids generated, an end token included; text, what the "
    "runtime shows of those before it, null where it has no tokenizer",
    "defaults": "sampling settings that are in force when nobody asks for any, by the runtime's own names",
    "errors": "one line for each thing that failed",
}


@dataclass(frozen=True)
class Question:
    """prompt: ids, run as they are. tokens: how many to generate at most. continues: on what the question before it
    left in the KV cache, behind its answer. chat: the conversation that the prompt is, for a chat completion.
    """

    prompt: tuple[int, ...]
    tokens: int
    continues: bool = False
    chat: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Request:
    """ends: ids to be made the next token in turn. anchor: an ordinary token. vocabulary: ids to decode one by one.
    sampled: the defaults draw at random, so that greedy answers must be asked for. scored: questions of a task, of
    which only the answers are wanted; none of them continues.
    """

    questions: tuple[Question, ...] = ()
    batch: tuple[tuple[int, ...], ...] = ()
    ends: tuple[int, ...] = ()
    anchor: int = 0
    vocabulary: int = 0
    sequences: tuple[tuple[int, ...], ...] = ()
    unprompted: tuple[Mapping[str, Any], ...] = ()
    sampled: bool = False
    scored: tuple[Question, ...] = ()

    @property
    def longest(self) -> int:
        """Positions that the longest of the conversations needs."""
        longest = so_far = 0
        for question in self.questions:
            so_far = len(question.prompt) + question.tokens + (so_far if question.continues else 0)
            longest = max(longest, so_far)
        most = max((question.tokens for question in self.questions), default=0)
        scored = (len(question.prompt) + question.tokens for question in self.scored)
        return max([longest, *scored, *(len(prompt) + most for prompt in self.batch)])

    @property
    def largest(self) -> int:
        """The largest id in it."""
        rows = [question.prompt for question in (*self.questions, *self.scored)] + [
            *self.batch,
            *self.sequences,
            self.ends,
        ]
        return max((max(row) for row in rows if row), default=0)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Request:
        """The inverse of as_json. Raises TypeError, ValueError, KeyError or AttributeError for anything else."""
        questions, scored = (
            tuple(Question(**{**question, "prompt": _ids(question["prompt"])}) for question in raw.get(name, ()))
            for name in ("questions", "scored")
        )
        rows = {name: tuple(_ids(row) for row in raw[name]) for name in ("batch", "sequences")}
        given = {**raw, **rows, "questions": questions, "scored": scored, "ends": _ids(raw["ends"])}
        return cls(**{**given, "unprompted": tuple(raw["unprompted"])})


def _ids(row: Any) -> tuple[int, ...]:
    if not all(type(index) is int and 0 <= index < 2**31 for index in row):
        raise ValueError("token ids are whole numbers of 31 bits")
    return tuple(row)


def prompt_of(question: Question, sequence: list[int], tokens: list[int]) -> list[int]:
    """All ids that a question is asked behind. sequence, tokens: prompt and answer of the question before it."""
    return behind(sequence, tokens, question.prompt) if question.continues else [*question.prompt]


def behind(sequence: list[int], tokens: list[int], suffix: tuple[int, ...]) -> list[int]:
    """The whole prompt of a question that continues: what was run, its answer, and the suffix.

    An end token of the answer that the suffix begins with is there once.
    """
    answer = tokens[:-1] if tokens and suffix and tokens[-1] == suffix[0] else tokens
    return [*sequence, *answer, *suffix]
