"""What gate G6 has every runtime generate, decode and say: from the checkpoint's own tokenizer, for a seed the same.

Conversations become prompts by the checkpoint's chat template (that runtimes render them alike is gate G5's), so that
every runtime generates behind the same ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from qalora_runtimes.behaviour import Question, Request
from qalora_runtimes.protocol import LongSequence, conversation

from qalora_export.checkpoint.generation import Generation
from qalora_export.data.prompts import read_prompts, token_ids
from qalora_export.models.families import family_of
from qalora_export.models.families.family import Format
from qalora_export.models.templates import TemplateRefusal
from qalora_export.recipe import VerifySettings
from qalora_export.verify.probes.probe_set import ProbeSet, rendered
from qalora_export.verify.probes.text import EDGE_TEXTS, TEXTS

FORMATS: tuple[Format, ...] = ("gguf", "onnx")
TOKENS = 24  # generated per answer
ENOUGH = 48  # for answers that should come to their end: the first, which a second turn follows, and the user's own
PROMPTS = 4  # of the user's own
RANDOM_SEQUENCES, RANDOM_LENGTH = 32, 24
LONG_AT = 64
UNPROMPTED = 3  # conversations that are rendered without a generation prompt
MARK = "Two."  # an assistant's turn, to find what a template puts behind one
NEXT = "Three?"


@dataclass(frozen=True)
class Expected:
    """What Hugging Face's tokenizer answers to a request's texts. piece: of anchor, id, anchor, by id."""

    hidden: list[str]
    shown: list[str]
    decoded: list[str]
    unprompted: list[str]


@dataclass(frozen=True)
class BehaviourProbes:
    """names: one per question of `request`; batch_names: one per prompt of its batch. expected: to its texts.

    texts: of each id. rows: ids that the model may write, those without a token included.
    """

    request: Request
    names: tuple[str, ...]
    expected: Expected
    texts: tuple[str | None, ...]
    rows: int

    @property
    def batch_names(self) -> tuple[str, ...]:
        return tuple(f"{name} in a batch" for name in self.names if "second turn" not in name)[
            : len(self.request.batch)
        ]


def make_behaviour(
    tokenizer: Any, config: Mapping[str, Any], generation: Generation, probes: ProbeSet, settings: VerifySettings
) -> BehaviourProbes:
    """Answers of TOKENS or ENOUGH tokens, fewer where the model's context holds no more."""
    family = family_of(config)
    context = min(int(family.exported(config, fmt)["max_position_embeddings"]) for fmt in FORMATS) - 1
    named = list(_questions(tokenizer, probes, settings, context))
    prompts = [question.prompt for _, question in named if not question.continues]
    vocabulary = min(len(tokenizer), int(config["vocab_size"]))
    anchor = _anchor(tokenizer)
    hidden = decoded(tokenizer, [[anchor, index, anchor] for index in range(vocabulary)], hide=True)
    sequences = _sequences(tokenizer, hidden, anchor, settings.seed)
    unprompted = [chat for chat in probes.chats if "tools" not in conversation(chat)][:UNPROMPTED]
    request = Request(
        questions=tuple(question for _, question in named),
        batch=tuple(prompts[:2]) if len(prompts) > 1 and len(prompts[0]) != len(prompts[1]) else (),
        ends=generation.ends,
        anchor=anchor,
        vocabulary=vocabulary,
        sequences=tuple(tuple(row) for row in sequences),
        unprompted=tuple(conversation(chat) for chat in unprompted),
        sampled=generation.do_sample or generation.repetition_penalty != 1,
    )
    expected = Expected(
        hidden=hidden,
        shown=decoded(tokenizer, [[anchor, index, anchor] for index in range(vocabulary)], hide=False),
        decoded=decoded(tokenizer, sequences, hide=True),
        unprompted=[rendered(tokenizer, chat, generation_prompt=False) for chat in unprompted],
    )
    texts = tokenizer.convert_ids_to_tokens(list(range(vocabulary)))
    return BehaviourProbes(request, tuple(name for name, _ in named), expected, tuple(texts), int(config["vocab_size"]))


def long_sequence(config: Mapping[str, Any], fmt: Format, probes: ProbeSet, settings: VerifySettings) -> LongSequence:
    """The probe set over and over, up to the context that an export of this format has; LONG_AT positions are compared.

    One position stays free, for llama.cpp asks for one more than it answers.
    """
    context = int(family_of(config).exported(config, fmt)["max_position_embeddings"])
    length = max(1, min(settings.long_length, context - 1))
    at = np.unique(np.linspace(0, length - 1, LONG_AT).astype(np.int32))
    return LongSequence(np.resize(probes.ids, length).astype(np.int32), at)


def decoded(tokenizer: Any, rows: list[list[int]], *, hide: bool) -> list[str]:
    """Texts of rows of ids. hide: special tokens."""
    found = tokenizer.batch_decode(rows, skip_special_tokens=hide, clean_up_tokenization_spaces=False)
    return [str(text) for text in found]


def _questions(
    tokenizer: Any, probes: ProbeSet, settings: VerifySettings, context: int
) -> Iterator[tuple[str, Question]]:
    """At least one; those that do not fit into the context with their answer are left out, the first is cut."""
    room = context
    for number, (name, ids, chat) in enumerate(_prompts(tokenizer, probes, settings)):
        tokens = ENOUGH if number >= len(probes.chats) else TOKENS
        tokens = tokens if number else max(1, min(ENOUGH, context // 4))
        if number == 0:
            ids = ids[: max(1, context - tokens - 1)]
        if not ids or len(ids) + tokens >= context:
            continue
        whole = chat if number or len(ids) + tokens < context else None
        yield name, Question(tuple(ids), tokens, chat=whole)
        turn = _turn(tokenizer) if number == 0 and chat is not None else []
        room = context - len(ids) - tokens
        if turn and len(turn) + tokens < room:
            yield f"{name}, second turn", Question(tuple(turn), tokens, continues=True)


def _prompts(
    tokenizer: Any, probes: ProbeSet, settings: VerifySettings
) -> Iterator[tuple[str, list[int], Mapping[str, Any] | None]]:
    """(name, ids, the conversation where llama.cpp's chat completion is asked too)"""
    for index, chat in enumerate(probes.chats):
        parts = conversation(chat)
        yield f"conversation {index}", _ids(tokenizer, rendered(tokenizer, chat)), None if "tools" in parts else parts
    for name, text in [] if probes.chats else EDGE_TEXTS.items():
        yield name, token_ids(tokenizer, text), None
    prompts = read_prompts(Path(settings.prompts)) if settings.prompts else []
    order = np.random.default_rng(settings.seed + 2).permutation(len(prompts))[:PROMPTS]
    for index in order:
        prompt, name = prompts[index], f"prompt {index + 1}"
        turns = [dict(message) for message in prompt.messages] if prompt.text is None else []
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
        if not turns or not tokenizer.chat_template:
            yield name, token_ids(tokenizer, prompt)[: settings.max_length], None
            continue
        try:
            yield name, _ids(tokenizer, rendered(tokenizer, tuple(turns))), {"messages": turns}
        except TemplateRefusal:
            continue


def _turn(tokenizer: Any) -> list[int]:
    """What a template puts between an answer and the next one: the end of the turn, a question, the prompt."""
    first = ({"role": "user", "content": "One?"}, {"role": "assistant", "content": MARK})
    try:
        text = rendered(tokenizer, (*first, {"role": "user", "content": NEXT}))
    except TemplateRefusal:
        return []
    return _ids(tokenizer, text.rpartition(MARK)[2]) if MARK in text else []


def _ids(tokenizer: Any, text: str) -> list[int]:
    return [int(index) for index in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _anchor(tokenizer: Any) -> int:
    """An ordinary token: decoders treat what begins or ends a text in their own way."""
    return _ids(tokenizer, "a")[-1]


def _sequences(tokenizer: Any, hidden: list[str], anchor: int, seed: int) -> list[list[int]]:
    """Texts of many scripts, and random ids that are whole characters; the anchor before each."""
    whole = [index for index, text in enumerate(hidden) if "\ufffd" not in text and "\0" not in text]
    random = np.random.default_rng(seed)
    drawn = [random.choice(whole, RANDOM_LENGTH).tolist() for _ in range(RANDOM_SEQUENCES)] if whole else []
    texts = [_ids(tokenizer, text) for text in (*TEXTS, *EDGE_TEXTS.values())]
    return [[anchor, *row] for row in (*texts, *drawn)]
