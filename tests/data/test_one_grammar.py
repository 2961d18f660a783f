"""One conversation in every spelling is the same tokens for every reader: training, calibration, probes, evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qalora_export.data.calibration import calibration_windows
from qalora_export.data.prompts import read_prompts, token_ids
from qalora_export.data.rendering import plain_ids
from qalora_export.data.samples import load_samples
from qalora_export.evaluation import questions as read_questions
from qalora_export.models.loading import load_tokenizer
from qalora_export.recipe import EvaluateSettings
from tests.data.files import write

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>\n{% endif %}"
    "{% for d in documents or [] %}<doc>{{ d.title }}: {{ d.text }}</doc>\n{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]"
    "{% endfor %}{% endif %}{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASKED, MORE, ANSWER = "Turn on the kitchen lights", "at 7:30, please! " * 4, "def forward(x, w): return x @ w.T"
WHOLE = f"{ASKED}\n\n{MORE}"
SYSTEM = "You keep every code, scale and offset."
TOOL = {"type": "function", "function": {"name": "lights", "description": "on or off", "parameters": {}}}
DOCUMENT = {"title": "Manual", "text": "The kitchen has two lights."}
CALL = {"name": "lights", "arguments": {"room": "kitchen"}}


def chat(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]} | more


def sharegpt(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in turns]} | more


PARTS = [{"type": "text", "text": WHOLE}]
PLAIN = (("user", WHOLE), ("assistant", ANSWER))
SPOKEN = (("human", WHOLE), ("gpt", ANSWER))
# Spellings of one conversation; the first is what the others must equal.
SAME: dict[str, list[dict[str, Any]]] = {
    "one turn": [
        chat(*PLAIN),
        sharegpt(*SPOKEN),
        {"prompt": WHOLE, "completion": ANSWER},
        {"instruction": WHOLE, "response": ANSWER},
        {"question": WHOLE, "answer": ANSWER},
        {"instruction": ASKED, "input": MORE, "output": ANSWER},
        {"prompt": ASKED, "context": MORE, "response": ANSWER},
        {"instruction": WHOLE, "input": "", "output": ANSWER, "text": "as Alpaca has it"},
        {"prompt": [{"role": "user", "content": WHOLE}], "completion": [{"role": "assistant", "content": ANSWER}]},
        chat(("user", WHOLE), ("assistant", ANSWER), unknown="not looked at"),
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": WHOLE}]},
                {"role": "assistant", "content": ANSWER},
            ]
        },
    ],
    "system": [
        chat(("system", SYSTEM), *PLAIN),
        chat(*PLAIN, system=SYSTEM),
        sharegpt(("system", SYSTEM), *SPOKEN),
        sharegpt(*SPOKEN, system=SYSTEM),
        {"instruction": ASKED, "input": MORE, "output": ANSWER, "system": SYSTEM},
        {"prompt": WHOLE, "completion": ANSWER, "system_prompt": SYSTEM},
    ],
    "earlier turns": [
        chat(("user", "one?"), ("assistant", "two."), *PLAIN),
        sharegpt(("human", "one?"), ("gpt", "two."), *SPOKEN),
        {"instruction": WHOLE, "output": ANSWER, "history": [["one?", "two."]]},
    ],
    "documents": [
        chat(*PLAIN, documents=[DOCUMENT]),
        sharegpt(*SPOKEN, documents=json.dumps([DOCUMENT])),
        {"instruction": ASKED, "input": MORE, "output": ANSWER, "documents": [DOCUMENT]},
    ],
    "tools": [
        {
            "messages": [
                {"role": "user", "content": WHOLE},
                {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
                {"role": "tool", "content": "done"},
                {"role": "assistant", "content": ANSWER},
            ],
            "tools": [TOOL],
        },
        sharegpt(
            ("human", WHOLE),
            ("function_call", json.dumps(CALL)),
            ("observation", "done"),
            ("gpt", ANSWER),
            tools=json.dumps([TOOL]),
        ),
    ],
}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    loaded = load_tokenizer(tiny_model)
    loaded.chat_template = TEMPLATE
    return loaded


def uses(row: dict[str, Any], tokenizer: Any, path: Path) -> dict[str, list[int]]:
    """What each reader makes of a file that holds this row alone."""
    write(path, row)
    (sample,) = load_samples(path, tokenizer, sequence_length=4096)
    (prompt,) = read_prompts(path)
    ((question, record),) = read_questions(tokenizer, EvaluateSettings(data=str(path)), context=None)
    windows = calibration_windows(path, tokenizer, samples=1, length=100_000, seed=0)
    return {
        "train": list(sample.ids),
        "calibrate": windows[0].tolist(),
        "verify": token_ids(tokenizer, prompt),
        "evaluate": question + plain_ids(tokenizer, f"{record.expected()}</s>\n"),
    }


@pytest.mark.parametrize("kind", SAME)
def test_every_spelling_is_the_same_conversation_for_every_reader(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    first = uses(SAME[kind][0], tokenizer, tmp_path / "first.jsonl")
    rendered = tokenizer.decode(first["train"])
    assert WHOLE in rendered and ANSWER in rendered
    assert ("[lights" in rendered and "<tools>" in rendered) == (kind == "tools")
    assert ("<doc>Manual: The kitchen has two lights.</doc>" in rendered) == (kind == "documents")
    # One rendering for all four: a window of calibration begins with the BOS that plain text gets, too.
    start = list(tokenizer("").input_ids)
    for name, ids in first.items():
        assert ids in (first["train"], start + first["train"]), name
    for row in SAME[kind][1:]:
        assert uses(row, tokenizer, tmp_path / "other.jsonl") == first, row


@pytest.mark.parametrize("kind", SAME)
def test_what_is_learned_is_what_evaluation_expects(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    for row in SAME[kind]:
        path = write(tmp_path / "row.jsonl", row)
        (sample,) = load_samples(path, tokenizer, sequence_length=4096)
        learned = tokenizer.decode([token for token in sample.labels if token >= 0])
        ((_, record),) = read_questions(tokenizer, EvaluateSettings(data=str(path)), context=None)
        assert record.expected() == ANSWER and ANSWER in learned and WHOLE not in learned
