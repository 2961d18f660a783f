"""Gate G5: the same text becomes the same token ids, the same conversation the same prompt, in every runtime.

The judge is Hugging Face's tokenizer of the checkpoint. llama.cpp and GenAI answer with their own tokenizers and
template engines; plain ONNX Runtime has none, so there the tokenizer files that ship in the ONNX folder answer.

Two habits of runtimes are known and not faults: llama.cpp cuts the BOS text from a rendered conversation and puts its
id back while tokenizing, and GenAI never adds special tokens to plain text (without a chat template the caller prepends
BOS). The ids of every rendered conversation are compared too, so a BOS that is lost or doubled on that way shows.

A GGUF file cannot say everything that tokenizer.json says (formats/gguf/tokenizer/reading.py). A text that shows such a
difference may get exactly the ids that the difference explains: that is a warning in the report, which names the text.

GenAI has a tokenizer of its own that leaves parts of tokenizer.json out (formats/onnx/genai_text/reading.py). Its ids
must be Hugging Face's, or exactly the predicted ones, which is a warning; on ordinary text, that is prose,
conversations and the user's own prompts, only where the folder was exported with --allow-text-differences.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from qalora_export.verify.gates.registry import measures
from qalora_export.verify.probes.probe_set import ProbeSet
from qalora_export.verify.reference.text import folder_answers
from qalora_export.verify.rule import Entry, Gate, Limit
from qalora_export.verify.runtimes.record import TextHabits
from qalora_export.verify.target import Target

SHOWN = 6
CLIP = 60
REWRITTEN = "the runtime describes tools in its own way; with tools, render prompts by the template yourself"
ACCEPT = "export onnx --allow-text-differences accepts it"

GATE = Gate(
    id="G5",
    title="text",
    what="token ids and rendered chat template against Hugging Face tokenizers",
    row="token ids that differ",
    limits=(
        Limit("differing_ids", 0, "ids", "a wrong id is a wrong prompt: the most frequent fault users report"),
        Limit("differing_chats", 0, "conversations", "the chat template is part of the model"),
    ),
)


@measures(GATE)
def text(target: Target) -> Entry:
    session, runtime = target.session, target.runtime
    if runtime.own_tokenizer:
        answers = session.runs.text_answers(runtime.name, target.shipped)
    else:
        answers = folder_answers(target.artifact, session.probes)
    accepted = runtime.text_differences_accepted(target.artifact)
    expected = expected_answers(session.expected_text, runtime.habits, accepted=accepted)
    return text_entry(runtime.name, session.probes, expected, answers)


def expected_answers(expected: dict[str, Any], habits: TextHabits, *, accepted: bool = False) -> dict[str, Any]:
    """What a runtime with these habits must answer; `expected` is folder_answers of the checkpoint.

    accepted: whether the artifact was exported with differences that its user accepted.
    """
    by_design = expected["by_design"] if habits.reads_gguf else {}
    refused = {}
    if habits.reads_as_genai:
        by_design = expected["genai"]["by_permission" if accepted else "by_design"]
        refused = expected["genai"]["by_permission"]
    elif accepted:
        by_design = {kind: found | by_design.get(kind, {}) for kind, found in expected["by_permission"].items()}
    cut = expected["bos"] if habits.cuts_bos else ""
    return {
        "texts": expected["texts" if habits.adds_specials else "plain_texts"],
        "rendered": [text.removeprefix(cut) for text in expected["rendered"]],
        "rendered_ids": expected["rendered_ids"],
        "by_design": by_design,
        "refused": refused,
        "tolerated": dict.fromkeys(expected["with_tools"], REWRITTEN) if habits.rewrites_tools else {},
    }


def text_entry(runtime: str, probes: ProbeSet, expected: dict[str, Any], answers: dict[str, Any]) -> Entry:
    """Compare a runtime's answers with expected_answers; every text and conversation must be answered.

    A text whose difference is by design, and is exactly that difference, is a warning in the report; so is a
    conversation with tools where the runtime has a form of its own for them.
    """
    findings: list[str] = []
    texts = zip(expected["rendered"], _list(answers, "rendered"), strict=False)
    other = {index for index, (want, got) in enumerate(texts) if isinstance(got, str) and got != want}
    rewritten = {index: reason for index, reason in expected["tolerated"].items() if index in other}
    warnings = [(f"conversation {index}", reason) for index, reason in rewritten.items()]
    wrong_ids = 0
    for kind, names in (("texts", probes.texts), ("rendered_ids", range(len(probes.chats)))):
        by_design = expected["by_design"].get(kind, {})
        asked_of = zip_longest(names, expected[kind], _list(answers, kind)[: len(names)])
        for index, (name, want, got) in enumerate(asked_of):
            wrong = _differing_ids(want, got)
            if wrong and index in by_design and by_design[index][0] == got:
                warnings.append((f"{kind} {_clip(name)}", by_design[index][1]))
                continue
            if wrong and kind == "rendered_ids" and index in rewritten:
                continue
            wrong_ids += wrong
            if wrong:
                known = expected["refused"].get(kind, {}).get(index, (None, ""))
                why = f" ({known[1]}; {ACCEPT})" if known[0] == got else ""
                findings.append(f"{kind} {_clip(name)}: {_first_difference(want, got)}{why}")
    wrong_chats = 0
    asked = range(len(probes.chats))
    for name, want, got in zip_longest(asked, expected["rendered"], _list(answers, "rendered")[: len(asked)]):
        if got != want and name not in rewritten:
            wrong_chats += 1
            findings.append(f"conversation {name}: {_first_difference(want, got)}")
    total = sum(len(ids) for kind in ("texts", "rendered_ids") for ids in expected[kind])
    return GATE.judge(
        runtime,
        {"differing_ids": wrong_ids, "differing_chats": wrong_chats},
        detail=f"{len(probes.texts)} texts and {len(probes.chats)} conversations, {total} ids{_said(warnings)}",
        where=findings[:SHOWN],
        figures={"ids": total, "findings": findings, "warnings": [": ".join(warning) for warning in warnings]},
    )


def _said(warnings: list[tuple[str, str]]) -> str:
    reasons = "; ".join(sorted({reason for _, reason in warnings}))
    return f"; warning: {len(warnings)} differ by design ({reasons})" if warnings else ""


def _list(answers: dict[str, Any], key: str) -> list[Any]:
    value = answers.get(key)
    return value if isinstance(value, list) else []


def _differing_ids(want: list[int], got: object) -> int:
    """Ids that differ or are missing or surplus; an absent answer differs in every id, and at least in one."""
    if not isinstance(got, list):
        return max(1, len(want))
    return sum(a != b for a, b in zip_longest(want, got))


def _first_difference(want: Any, got: Any) -> str:
    if not isinstance(got, list | str):
        return "no answer"
    index = next((i for i, (a, b) in enumerate(zip_longest(want, got)) if a != b), 0)
    found = f"at {index}: expected {_clip(want[index : index + 8])}, got {_clip(got[index : index + 8])}"
    if isinstance(got, list) and len(got) == len(want) + 1 and got[1:] == want:
        found += " (one id more at the start: if it is BOS, begin the chat template with {{ bos_token }})"
    return found


def _clip(value: object) -> str:
    return repr(value)[:CLIP]
