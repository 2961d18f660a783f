"""Token ids and labels: what is learned, judged by decoding it back."""

import json
from pathlib import Path
from typing import Any

import pytest

from qalora_export.data.samples import IGNORED, Sample, load_samples
from qalora_export.errors import InputError
from qalora_export.models.loading import load_tokenizer

MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>\n"
    "{% generation %}{{ m['content'] | trim }}<|end|>{% endgeneration %}\n"
    "{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] | trim + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
FORGETFUL = (  # as reasoning templates do: only the last answer is rendered in full
    "{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{% if m['role'] == 'assistant' and not loop.last %}...{% else %}{{ m['content'] }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "You control devices."},
    {"role": "user", "content": "lights on, please"},
    {"role": "assistant", "content": '{"on": "café 🙂"}'},
    {"role": "user", "content": "<|assistant|> off"},
    {"role": "assistant", "content": "done\n  twice  "},
]


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


def load(path: Path, tokenizer: Any, *rows: object, length: int = 512, **options: Any) -> list[Sample]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_samples(path, tokenizer, sequence_length=length, **options)


def learned(sample: Sample, tokenizer: Any) -> list[str]:
    """The decoded runs of learned tokens."""
    runs: list[list[int]] = [[]]
    for token, label in zip(sample.ids, sample.labels, strict=True):
        assert label in (token, IGNORED)
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("template", [None, MARKED])
def test_only_answers_and_their_end_of_turn_are_learned(tmp_path: Path, tokenizer: Any, template: str | None) -> None:
    if template:
        tokenizer.chat_template = template
    (sample,) = load(tmp_path / "a.jsonl", tokenizer, {"messages": TALK})
    assert learned(sample, tokenizer) == ['{"on": "café 🙂"}<|end|>', "done\n  twice<|end|>"]
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert list(sample.ids) == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_an_instruction_is_a_conversation_of_two(tmp_path: Path, tokenizer: Any) -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    talk = [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]
    assert load(tmp_path / "a.jsonl", tokenizer, row) == load(tmp_path / "b.jsonl", tokenizer, {"messages": talk})
    assert learned(load(tmp_path / "a.jsonl", tokenizer, row)[0], tokenizer) == ["3<|end|>"]


def test_text_learns_every_token_and_the_end(tmp_path: Path, tokenizer: Any) -> None:
    (sample,) = load(tmp_path / "a.jsonl", tokenizer, {"text": "Turn on the lights"})
    assert learned(sample, tokenizer) == ["Turn on the lights<|end|>"]
    assert tokenizer.decode(sample.ids[:1]) == "<|begin_of_text|>"
    assert sample.labels[0] == IGNORED


def test_long_text_is_divided_and_nothing_is_lost(tmp_path: Path, tokenizer: Any) -> None:
    text = "the quick brown fox " * 50
    pieces = load(tmp_path / "a.jsonl", tokenizer, {"text": text}, length=64, context=32)
    assert {len(piece) for piece in pieces[:-1]} == {32}
    assert [i for piece in pieces for i in piece.ids] == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


def test_long_conversations_are_refused_by_line(tmp_path: Path, tokenizer: Any) -> None:
    short = {"prompt": "a", "output": "b"}
    long = {"prompt": "a", "output": "b c d e f g " * 20}
    with pytest.raises(InputError, match="2 of 4 samples are longer than sequence_length, 40") as error:
        load(tmp_path / "a.jsonl", tokenizer, short, long, short, long, length=40)
    assert error.value.where.endswith("lines 2, 4")
    longest = max(map(len, load(tmp_path / "a.jsonl", tokenizer, long)))
    assert f"--sequence-length {longest}" in error.value.fix
    with pytest.raises(InputError, match="longer than the model's context, 40") as error:
        load(tmp_path / "a.jsonl", tokenizer, long, context=40)
    assert "shorten or remove" in error.value.fix


def test_templates_that_hide_the_answer_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    talk = {"messages": TALK}
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(InputError, match="cannot tell which tokens are answer 3") as error:
        load(tmp_path / "a.jsonl", tokenizer, talk)
    assert error.value.where.endswith("line 1")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="roles must alternate"):
        load(tmp_path / "a.jsonl", tokenizer, talk)
    tokenizer.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(InputError, match="shows nothing of the answer"):
        load(tmp_path / "a.jsonl", tokenizer, talk)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template") as error:
        load(tmp_path / "a.jsonl", tokenizer, talk)
    assert "--format text" in error.value.fix


def test_a_conversation_that_begins_with_an_answer_needs_markers(tmp_path: Path, tokenizer: Any) -> None:
    talk = {"messages": TALK[2:]}
    with pytest.raises(InputError, match="cannot begin with the assistant"):
        load(tmp_path / "a.jsonl", tokenizer, talk)
    tokenizer.chat_template = MARKED
    assert learned(load(tmp_path / "a.jsonl", tokenizer, talk)[0], tokenizer)[0] == '{"on": "café 🙂"}<|end|>'
