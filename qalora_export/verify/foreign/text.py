"""Tokenizer and chat template: what the runtime answers to texts and conversations, against Hugging Face's tokenizer;
and, where they differ, which table of the artifact is to blame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

from qalora_export.verify.foreign.diagnosis import Part
from qalora_export.verify.gates.g5_text import expected_answers, text_entry
from qalora_export.verify.probes.probe_set import ProbeSet
from qalora_export.verify.runtimes.facts import differing_facts
from qalora_export.verify.runtimes.record import TextHabits

# Facts of runtimes.facts by which a tokenizer decides; the chat template has a part of its own.
TOKENIZER_FACTS = ("tokens", "merges", "tokens by rank", "scores", "BOS id", "ids around an empty text")
SHOWN = 6


def tokenizer_part(
    runtime: str,
    probes: ProbeSet,
    expected: dict[str, Any],
    answers: dict[str, Any],
    habits: TextHabits,
    facts: tuple[Mapping[str, Any], Mapping[str, Any]],
) -> Part:
    """expected: reference.text.folder_answers of the model. facts: (of the model, of the artifact), by name."""
    wanted = expected_answers(expected, habits)
    same = [index for index, text in enumerate(wanted["rendered"]) if _at(answers, "rendered", index) == text]
    asked = replace(probes, chats=tuple(probes.chats[index] for index in same))
    entry = text_entry(runtime, asked, _only(wanted, same), _only_answers(answers, same))
    figures = dict(entry.figures or {})
    if entry.status == "pass":
        return Part("tokenizer", runtime, "ok", entry.detail, figures=figures)
    count = int(entry.checks[0].measured)
    blame = [*differing_facts(*(_tokenizer_facts(side) for side in facts)), *_more_tokens(probes, *facts)]
    figures |= {"differing": count, "tables": len(blame)}
    first = str(entry.where[0]) if entry.where else ""
    what = blame[0] if blame else first
    proof = (
        f"{len(blame)} of its tables differ from the model's"
        if blame
        else "its tables are the model's, so the runtime cuts text in another way (pre-tokenizer, normalizer)"
    )
    sentence = f"{count} of {figures.get('ids')} ids of the probe texts differ; {what}"
    return Part("tokenizer", runtime, "broken", sentence, (*blame, *entry.where), proof, figures)


def template_part(
    runtime: str,
    probes: ProbeSet,
    expected: dict[str, Any],
    answers: dict[str, Any],
    habits: TextHabits,
    templates: tuple[object, object],
) -> Part:
    """templates: (of the model, of the artifact)."""
    wanted = expected_answers(expected, habits)
    if not probes.chats:
        ours, theirs = templates
        if theirs and not ours:
            return Part("template", runtime, "broken", "the artifact has a chat template, the model has none")
        return Part("template", runtime, "ok", "the model has no chat template")
    findings = []
    for index, text in enumerate(wanted["rendered"]):
        found = _at(answers, "rendered", index)
        if found != text and index not in wanted["tolerated"]:
            findings.append(f"conversation {index}: {_first_difference(text, found)}")
    if not findings:
        return Part("template", runtime, "ok", f"{len(probes.chats)} conversations are rendered alike")
    same = templates[0] == templates[1]
    absent = not templates[1]
    proof = (
        "the template is the model's, letter by letter, so the runtime's template engine renders it differently"
        if same
        else "the artifact has none, so the runtime takes one of its own"
        if absent
        else f"the artifact's template is another text: {_first_difference(templates[0], templates[1])}"
    )
    sentence = f"{len(findings)} of {len(probes.chats)} conversations are rendered differently; {findings[0]}"
    return Part("template", runtime, "broken", sentence, tuple(findings[:SHOWN]), proof)


def without_bos(answers: dict[str, Any], bos: str) -> dict[str, Any]:
    """answers with every conversation as a runtime renders it that puts BOS before it while tokenizing: one that does
    not (its ids tell) leaves it to the template.
    """
    rendered = answers.get("rendered")
    texts = rendered if isinstance(rendered, list) else []
    return {**answers, "rendered": [t.removeprefix(bos) if isinstance(t, str) else t for t in texts]}


def _tokenizer_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: facts[name] for name in TOKENIZER_FACTS if name in facts}


def _more_tokens(probes: ProbeSet, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Tokens behind the model's last one that stand in a text: no filler then, and the text is cut there."""
    count = len(ours.get("tokens") or [])
    behind = list(theirs.get("tokens") or [])[count:]
    return [
        f"{token!r} (id {count + place}) is a token here and none of the model's"
        for place, token in enumerate(behind)
        if isinstance(token, str) and token and any(token in text for text in probes.texts)
    ]


def _only(wanted: dict[str, Any], chats: Sequence[int]) -> dict[str, Any]:
    """expected_answers of some of the conversations."""
    by_design = dict(wanted["by_design"])
    if "rendered_ids" in by_design:
        numbered = {index: number for number, index in enumerate(chats)}
        by_design["rendered_ids"] = {
            numbered[index]: found for index, found in by_design["rendered_ids"].items() if index in numbered
        }
    kept = {key: [wanted[key][index] for index in chats] for key in ("rendered", "rendered_ids")}
    return {**wanted, **kept, "by_design": by_design, "tolerated": {}}


def _only_answers(answers: dict[str, Any], chats: Sequence[int]) -> dict[str, Any]:
    return {**answers, **{key: [_at(answers, key, index) for index in chats] for key in ("rendered", "rendered_ids")}}


def _at(answers: Mapping[str, Any], key: str, index: int) -> Any:
    values = answers.get(key)
    return values[index] if isinstance(values, list) and index < len(values) else None


def _first_difference(want: object, got: object) -> str:
    if not isinstance(want, str) or not isinstance(got, str):
        return "no answer" if got is None else f"{got!r:.60}"
    index = next((i for i, (a, b) in enumerate(zip_longest(want, got)) if a != b), 0)
    return f"from character {index} {got[index : index + 40]!r} instead of {want[index : index + 40]!r}"
