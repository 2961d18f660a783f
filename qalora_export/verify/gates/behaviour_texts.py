"""What gate G6 holds of texts: the same tokens are the same text, in answers, sequences, conversations and id by id."""

from __future__ import annotations

import re
from typing import Any

from qalora_export.errors import RuntimeUnavailableError
from qalora_export.verify.gates.behaviour_findings import MOST, Found, clip
from qalora_export.verify.probes.behaviour import BehaviourProbes
from qalora_export.verify.target import Target

MARKS = re.compile("(\ufffd+)")
UNKNOWN = re.compile("[\0\ufffd\ufffe\uffff]")  # where TextHabits.own_decoder has no text to compare


def judge_texts(target: Target, probes: BehaviourProbes, said: dict[str, Any], found: Found) -> None:
    """Answers, fixed and random sequences, conversations without a generation prompt."""
    loose = target.runtime.habits.own_decoder
    expected = target.session.answer_texts([answer["tokens"] for answer in said["answers"]])
    for name, want, answer in zip(probes.names, expected, said["answers"], strict=True):
        chat = answer["chat"]
        for what, got in ((name, answer["text"]), (f"{name}, chat completion", chat and chat["text"])):
            if got is not None and not same(want, got, loose=loose):
                found.wrong("wrong_texts", f"{what}: expected {clip(want)}, got {clip(got)}")
    decoded = said["decoded"] or []
    if said["decoded"] is None:
        found.missing.append("texts of sequences")
    for index, want in enumerate(probes.expected.decoded if said["decoded"] is not None else []):
        got = decoded[index] if index < len(decoded) else None
        if got is None or not same(want, got, loose=loose):
            found.wrong("wrong_texts", f"text {index}: expected {clip(want)}, got {clip(got)}")
    cut = str(target.session.expected_text["bos"]) if target.runtime.habits.cuts_bos else ""
    for index, want in enumerate(probes.expected.unprompted):
        got = said["unprompted"][index] if index < len(said["unprompted"]) else None
        if got != want.removeprefix(cut):
            found.wrong("wrong_texts", f"conversation {index} without generation prompt: got {clip(got)}")


def judge_pieces(target: Target, probes: BehaviourProbes, said: dict[str, Any], found: Found) -> None:
    if said["pieces"] is None:
        found.missing.append("the text of every id")
        return
    wrong: dict[int, str] = {}
    habits, design = target.runtime.habits, target.runtime.texts_by_design(probes.texts)
    for kind in ("hidden", "shown"):
        got = said["pieces"].get(kind)
        if got is None:
            continue
        expected = getattr(probes.expected, kind)
        if len(got) != len(expected):
            raise RuntimeUnavailableError(f"{len(got)} of {len(expected)} ids were decoded")
        for index, (want, text) in enumerate(zip(expected, got, strict=True)):
            if same(want, text, loose=habits.own_decoder):
                continue
            either = (probes.expected.hidden[index], probes.expected.shown[index])
            if index in design and any(same(other, text) for other in either):
                found.warnings.append(design[index])
            else:
                wrong.setdefault(index, f"id {index} ({kind}): expected {clip(want)}, got {clip(text)}")
    if wrong:
        found.counts["wrong_pieces"] += len(wrong)
        found.findings["wrong_pieces"] = list(wrong.values())[:MOST]


def same(want: str, got: str, *, loose: bool = False) -> bool:
    """A space at the start, and what stands for bytes that are no character, are each decoder's own.

    loose: of a runtime with TextHabits.own_decoder.
    """
    want, got = want.removeprefix(" "), got.removeprefix(" ")
    if loose and UNKNOWN.search(want):
        return True
    if loose:
        want, got = want.replace(" ", ""), got.replace(" ", "")
    if "\ufffd" not in want:
        return want == got
    # One mark for each byte of a run that is no text, or for each that is none by itself.
    pattern = "".join(
        f".{{0,{2 * len(part)}}}" if part.startswith("\ufffd") else re.escape(part) for part in MARKS.split(want)
    )
    return re.fullmatch(pattern, got, re.DOTALL) is not None
