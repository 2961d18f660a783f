"""What llama.cpp generates as its server does: chat completion, end tokens, texts, sampling defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from qalora_runtimes import heartbeat
from qalora_runtimes.behaviour import ASKED, END, LIMIT, QUESTIONS, Question, Request, prompt_of
from qalora_runtimes.llama_cpp.c_api import Context
from qalora_runtimes.llama_cpp.client import Client
from qalora_runtimes.scoring import RunnerError
from qalora_runtimes.side_by_side import questions_together

STOPS = {"eos": END, "limit": LIMIT, "stop": END, "length": LIMIT}  # of /completion and of chat completion
# Asked for only where the defaults that ship draw at random: then no two answers are alike.
GREEDY = {"temperature": 0.0, "repeat_penalty": 1.0}
FORCE = 1e9  # added to the logit of one token
SAMPLING = {  # of /props: what changes which token comes
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "repeat_penalty", "repeat_last_n", "samplers"),
    *("presence_penalty", "frequency_penalty", "xtc_probability", "dry_multiplier", "mirostat", "top_n_sigma"),
    *("dynatemp_range", "adaptive_target"),
}


def behave(client: Client, request: Request, context: Context | None) -> dict[str, Any]:
    """behaviour.ANSWER_KEYS. context: the C API of the same file, where it is known; a server cannot be asked which ids
    end generation, nor for texts with special tokens hidden.
    """
    errors: list[str] = []
    greedy = GREEDY if request.sampled else {}
    answers, before = list[dict[str, Any]](), list[int]()
    for index, question in enumerate(request.questions):
        heartbeat.at("answers", index, len(request.questions))
        ids = prompt_of(question, before, answers[-1]["tokens"] if answers else [])
        chat = _chat(client, question, greedy, errors)  # first: what comes next continues on this answer's cache
        answers.append(_answer(client, ids, question.tokens, greedy) | {"chat": chat})
        before = ids
    return {
        "answers": answers,
        "batch": None,
        "ends": {"all": None if context is None else context.ends(), "forced": _forced(client, request)},
        "pieces": _shown(client, request) if context is None else _pieces(context, request),
        "decoded": None if context is None else [_text(context, row) for row in request.sequences],
        "unprompted": [_rendered(client, chat, errors) for chat in request.unprompted],
        "scored": [_scored(client, request, index, greedy) for index in range(len(request.scored))],
        "defaults": {name: value for name, value in client.defaults().items() if name in SAMPLING},
        "errors": errors,
    }


def only_scored(context: Context, request: Request, sequences: int = 1) -> dict[str, Any]:
    """behaviour.ANSWER_KEYS of a request for a task alone, generated through the C API with the context's settings.

    sequences: how many answers grow side by side, in `context` with as many sequences: a step reads every weight
    whatever it computes, so several tokens cost little more than one.
    """
    ends, made = set(context.ends()), list[list[int]]()
    for group in questions_together(request.scored, context.cells, most=sequences):
        heartbeat.at(QUESTIONS, len(made), len(request.scored))
        made += _greedy(context, group, ends)
    answers = []
    for tokens in made:
        shown = tuple(tokens[:-1] if tokens[-1] in ends else tokens)
        answers.append({"tokens": tokens, "text": _text(context, shown)})
    empty: dict[str, Any] = {name: [] for name in ("answers", "unprompted", "errors")}
    nothing = dict.fromkeys(("batch", "pieces", "decoded"))
    return {**empty, **nothing, "ends": {"all": sorted(ends), "forced": {}}, "defaults": {}, "scored": answers}


def _greedy(context: Context, questions: Sequence[Question], ends: set[int]) -> list[list[int]]:
    """To each question the likeliest token again and again, up to and with one of `ends`."""
    context.clear()
    made: list[list[int]] = []
    for number, question in enumerate(questions):
        ids = np.asarray(question.prompt, np.int32)
        for at in range(0, len(ids), context.batch_limit):
            part = ids[at : at + context.batch_limit]
            rows = context.run(part, at, [len(part) - 1], sequence=number)
        made.append([int(np.argmax(rows[-1]))])

    def going(number: int) -> bool:
        return len(made[number]) < questions[number].tokens and made[number][-1] not in ends

    while still := [number for number in range(len(questions)) if going(number)]:
        positions = [len(questions[number].prompt) + len(made[number]) - 1 for number in still]
        rows = context.step([made[number][-1] for number in still], positions, still)
        for number, row in zip(still, rows, strict=True):
            made[number].append(int(np.argmax(row)))
    return made


def _scored(client: Client, request: Request, index: int, options: Mapping[str, Any]) -> dict[str, Any]:
    heartbeat.at(QUESTIONS, index, len(request.scored))
    question = request.scored[index]
    found = _answer(client, [*question.prompt], question.tokens, options)
    return {"tokens": found["tokens"], "text": found["text"]}


def _answer(client: Client, ids: list[int], tokens: int, options: Mapping[str, Any]) -> dict[str, Any]:
    found = client.complete(ids, tokens, options)
    made, stop = [int(token) for token in found["tokens"]], STOPS.get(found.get("stop_type", ""), LIMIT)
    if stop == LIMIT and len(made) == tokens:
        stop = ASKED
    cached = int(found.get("timings", {}).get("cache_n", 0))
    return {"tokens": made, "stop": stop, "text": str(found["content"]), "cached": cached}


def _chat(client: Client, question: Question, options: Mapping[str, Any], errors: list[str]) -> dict[str, Any] | None:
    """reasoning_format: what the model writes, not what a parser makes of it."""
    if question.chat is None:
        return None
    try:
        found = client.chat(question.chat, question.tokens, {**options, "reasoning_format": "none"})
    except RunnerError as error:
        errors.append(f"chat completion: {error}")
        return None
    stop = {"stop": END, "length": ASKED, "tool_calls": END}.get(found.get("finish_reason", ""), LIMIT)
    return {"text": found["message"].get("content"), "stop": stop}


def _forced(client: Client, request: Request) -> dict[str, str]:
    """What happens when each end token is the next one, behind the first question."""
    found = dict[str, str]()
    for end in request.ends:
        prompt = [*request.questions[0].prompt]
        answer = _answer(client, prompt, 2, {**GREEDY, "logit_bias": [[end, FORCE]]})
        found[str(end)] = answer["stop"] if answer["tokens"][:1] == [end] else f"{answer['tokens'][:1]} came instead"
    return found


def _pieces(context: Context, request: Request) -> dict[str, list[str]]:
    def sandwiches(*, special: bool) -> list[str]:
        anchor = context.piece(request.anchor, special=special)
        pieces = (context.piece(index, special=special) for index in range(request.vocabulary))
        return [(anchor + piece + anchor).decode("utf-8", "replace") for piece in pieces]

    return {"hidden": sandwiches(special=False), "shown": sandwiches(special=True)}


def _shown(client: Client, request: Request) -> dict[str, list[str] | None]:
    """By a server, which hides no special token: a question for each id."""
    rows = ([request.anchor, index, request.anchor] for index in range(request.vocabulary))
    return {"hidden": None, "shown": [client.shown(row) for row in rows]}


def _text(context: Context, ids: tuple[int, ...]) -> str:
    return b"".join(context.piece(token, special=False) for token in ids).decode("utf-8", "replace")


def _rendered(client: Client, chat: Mapping[str, Any], errors: list[str]) -> str | None:
    try:
        return client.render(chat, generation_prompt=False)
    except RunnerError as error:
        errors.append(f"template without a generation prompt: {error}")
        return None
