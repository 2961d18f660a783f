"""Gate G6: through its own generation path, with the defaults that ship, a runtime answers as Transformers would.

Greedy answers of conversations, of a second turn on the KV cache and of a padded batch are the reference's own token by
token, but for near-ties (verify/reference/answers.py says what one is); they stop where they must and nowhere else; the
text is the same. Every end token of the model's folder is made the next token once, and must end the answer; no other
id may. Every id of the vocabulary, texts of many scripts and random ids decode alike. Sampling settings that are in
force when nobody asks for any are those of the folder. One sequence reaches the end of the context, at most
VerifySettings.long_length tokens, on the exact path.

What a format or a runtime cannot say is by design, and named: llama.cpp ends at tokens with certain texts and hides
them, GenAI has no place for some settings of `generate`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from qalora_runtimes.behaviour import ASKED, END, Question, prompt_of

from qalora_export.errors import InputError, RuntimeUnavailableError
from qalora_export.verify.gates.behaviour_findings import MOST, Found, clip, shown_token
from qalora_export.verify.gates.behaviour_texts import judge_pieces, judge_texts
from qalora_export.verify.gates.registry import measures
from qalora_export.verify.metrics import position_metrics
from qalora_export.verify.probes.behaviour import BehaviourProbes
from qalora_export.verify.reference.answers import Answer
from qalora_export.verify.rule import Entry, Gate, Limit
from qalora_export.verify.target import Target

GATE = Gate(
    id="G6",
    title="behaviour",
    what="what is generated, where it stops, what is shown and what is set by default, against Transformers",
    row="tokens of greedy answers that differ",
    limits=(
        Limit("deviations", 0, "tokens", "a token the reference would not write, beyond what int8 may turn over"),
        Limit("wrong_stops", 0, "answers", "an answer that goes on behind its end, or ends before it"),
        Limit(
            "wrong_ends", 0, "end tokens", "an end token that is not one makes a model talk on; one too many cuts it"
        ),
        Limit("wrong_texts", 0, "texts", "the same tokens are the same text"),
        Limit("wrong_pieces", 0, "ids", "an id that decodes otherwise is wrong in every answer that holds it"),
        Limit(
            "long_nmse",
            1e-6,
            "NMSE",
            "rounding leaves 2e-7 at the worst positions; a window, RoPE or a cache that is wrong, 1e-4 and more",
        ),
        Limit("wrong_defaults", 0, "settings", "what nobody asks for is what the model's folder says"),
    ),
)


@measures(GATE)
def behaviour(target: Target) -> Entry:
    try:
        return _measured(target)
    except InputError as error:  # files that were changed under us, which gate G0 names
        raise RuntimeUnavailableError(f"the files cannot be read any more: {error}") from error


def _measured(target: Target) -> Entry:
    session, runtime = target.session, target.runtime
    probes = session.behaviour
    said = session.runs.behaviour(runtime.name, target.shipped, probes.request)
    if not runtime.own_tokenizer:
        said |= runtime.text_behaviour(target.artifact, probes, said)
    found = Found(GATE.limits)
    answers = _answers(probes, said, found)
    _judge_tokens(target, answers, found)
    _judge_stops(target, probes, said, found)
    judge_texts(target, probes, said, found)
    judge_pieces(target, probes, said, found)
    _judge_ends(target, probes, said, found)
    _judge_defaults(target, said, found)
    positions = _judge_long(target, found)
    tokens = sum(len(answer.tokens) for answer in answers)
    parts = [
        f"{len(answers)} answers, {tokens} tokens, {len(found.near)} near-ties",
        f"{len(probes.request.ends)} end tokens",
        f"{probes.request.vocabulary} ids",
        f"{positions} positions, NMSE {found.counts['long_nmse']:.2e}",
        *(f"not asked: {what}" for what in found.missing),
    ]
    if found.warnings:
        parts.append(f"warning: {len(found.warnings)} by design ({'; '.join(sorted(set(found.warnings)))[:300]})")
    entry = GATE.judge(
        target.name,
        found.counts,
        detail="; ".join(parts),
        where=found.where,
        figures={
            **found.counts,
            "answers": len(answers),
            "tokens": tokens,
            "near_ties": found.near[:MOST],
            "findings": found.findings,
            "warnings": found.warnings,
        },
    )
    return entry if not found.missing or entry.status == "fail" else GATE.not_run(target.name, entry.detail)


def _answers(probes: BehaviourProbes, said: dict[str, Any], found: Found) -> list[Answer]:
    """Every answer behind what it was really generated behind. Raises RuntimeUnavailableError for none."""
    questions, given = probes.request.questions, said["answers"]
    if len(given) != len(questions):
        raise RuntimeUnavailableError(f"{len(given)} of {len(questions)} questions were answered")
    answers, before, answer_before = list[Answer](), list[int](), list[int]()
    for name, question, answer in zip(probes.names, questions, given, strict=True):
        prompt = prompt_of(question, before, answer_before)
        if question.continues and not answer["cached"]:
            found.missing.append(f"{name}: the cache was empty")
        before, answer_before = prompt, answer["tokens"]
        answers.append(Answer(name, tuple(prompt), tuple(answer["tokens"])))
        if not answer["tokens"]:
            found.wrong("wrong_stops", f"{name}: nothing was generated")
    rows = zip(probes.batch_names, probes.request.batch, said["batch"] or [], strict=False)
    answers += [Answer(name, prompt, tuple(tokens)) for name, prompt, tokens in rows]
    for answer in answers:
        if any(not 0 <= token < probes.rows for token in answer.tokens):
            raise RuntimeUnavailableError(f"{answer.name}: a token outside the vocabulary was generated")
    return answers


def _judge_tokens(target: Target, answers: list[Answer], found: Found) -> None:
    cost = _cost(target)
    for deviation in target.session.greedy.deviations(answers):
        came, wanted = shown_token(target, deviation.token), shown_token(target, deviation.wanted)
        behind_by = f"{deviation.margin:.3g} nats behind, where int8 spreads {deviation.spread:.2g}"
        place = f"{deviation.name}, token {deviation.index + 1}: {came} instead of {wanted}, {behind_by}"
        if deviation.near(cost):
            found.near.append(place)
        else:
            found.wrong("deviations", place)


def _cost(target: Target) -> float:
    """How much more than the simulation the shipped path costs: noise is as the square root of the KL divergence."""
    try:
        shipped = target.prefill("shipped").summary().kl_mean
    except RuntimeUnavailableError:
        return 1.0
    simulated = target.session.simulation.summary().kl_mean
    return float((shipped / simulated) ** 0.5) if simulated > 0 and shipped > 0 else 1.0


def _judge_stops(target: Target, probes: BehaviourProbes, said: dict[str, Any], found: Found) -> None:
    """Each answer ends at its first end token, or has all tokens that were asked for."""
    by_design = target.runtime.ends_by_design(probes.texts)
    ends = {*probes.request.ends, *by_design}
    asked = list(zip(probes.names, probes.request.questions, said["answers"], strict=True))
    for name, question, answer in asked:
        _judge_stop(name, question, answer["tokens"], answer["stop"], ends, found)
        chat = answer["chat"]
        if chat is not None and chat["stop"] != answer["stop"]:
            found.wrong("wrong_stops", f"{name}: chat completion stopped by {chat['stop']!r}, not {answer['stop']!r}")
    first = probes.request.questions[0]
    for name, tokens in zip(probes.batch_names, said["batch"] or [], strict=False):
        stop = END if tokens and tokens[-1] in ends else ASKED
        _judge_stop(name, first, tokens, stop, ends, found)


def _judge_stop(name: str, question: Question, tokens: list[int], stop: str, ends: set[int], found: Found) -> None:
    early = next((index for index, token in enumerate(tokens[:-1]) if token in ends), None)
    if early is not None:
        found.wrong("wrong_stops", f"{name}: it goes on behind the end token {tokens[early]} (token {early + 1})")
    elif tokens and (tokens[-1] in ends) != (stop == END):
        found.wrong("wrong_stops", f"{name}, token {len(tokens)}: stopped by {stop!r} at id {tokens[-1]}")
    elif stop not in (END, ASKED) or (stop == ASKED and len(tokens) != question.tokens):
        found.wrong("wrong_stops", f"{name}: stopped by {stop!r} after {len(tokens)} of {question.tokens} tokens")


def _judge_ends(target: Target, probes: BehaviourProbes, said: dict[str, Any], found: Found) -> None:
    ends, design = probes.request.ends, target.runtime.ends_by_design(probes.texts)
    for end in ends:
        happened = said["ends"]["forced"].get(str(end), "nothing")
        if happened != END:
            found.wrong("wrong_ends", f"end token {shown_token(target, end)} made the next one: {happened}")
    stops = said["ends"]["all"]
    if stops is None:
        found.missing.append("which ids end generation")
        return
    for end in sorted({*ends} - {*stops}):
        found.wrong("wrong_ends", f"{shown_token(target, end)} does not end generation")
    for index in sorted({*stops} - {*ends}):
        if index in design:
            found.warnings.append(design[index])
        else:
            found.wrong(
                "wrong_ends", f"{shown_token(target, index)} ends generation, the model's folder does not say so"
            )


def _judge_defaults(target: Target, said: dict[str, Any], found: Found) -> None:
    generation, checkpoint = target.session.generation, target.session.checkpoint
    for name, want in target.runtime.expected_defaults(generation, checkpoint.config).items():
        got = said["defaults"].get(name)
        if not _equal(want, got):
            found.wrong("wrong_defaults", f"{name} is {clip(got)} by default, the model's folder says {want!r}")
    lost = target.runtime.lost_settings(generation)
    found.warnings += [f"{target.name} has no place for {name}" for name in lost]


def _judge_long(target: Target, found: Found) -> int:
    """One sequence up to the end of the context, on the exact path: windows, RoPE scaling and cache limits show there.

    How many positions it has.
    """
    sequence, reference = target.session.long(target.runtime.format)
    try:
        values = target.session.runs.long(target.name, target.exact, sequence)
    except RuntimeUnavailableError as error:
        found.missing.append(f"a long sequence ({error.reason})")
        return 0
    metrics = position_metrics(reference, values, np.zeros(len(reference), np.int32))
    nmse = np.where(metrics.bad, np.inf, metrics.nmse)
    found.counts["long_nmse"] = float(nmse.max())
    beyond = np.flatnonzero(~(nmse <= GATE.limit("long_nmse").bound))
    if beyond.size:
        first = int(beyond[0])
        found.findings["long_nmse"] = [
            f"a long sequence leaves the reference at position {sequence.at[first]} of {len(sequence.ids)}, "
            f"NMSE {nmse[first]:.2e}; at {beyond.size} of {len(nmse)} positions in all"
        ]
    return len(sequence.ids)


def _equal(want: Any, got: Any) -> bool:
    numbers = [value for value in (want, got) if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) == 2:
        return bool(abs(want - got) <= 1e-6 * max(1.0, abs(want)))  # kept in float32
    return bool(type(want) is type(got) and want == got)
