"""Token ids and labels: what is learned, judged by decoding it back."""

from pathlib import Path
from typing import Any

import pytest

from qalora_export.data import lines
from qalora_export.data.samples import IGNORED, Sample, load_samples
from qalora_export.errors import InputError
from qalora_export.models.loading import load_tokenizer
from tests.data.files import write

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
    return load_samples(write(path, *rows), tokenizer, sequence_length=length, **options).samples


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


SHORT, LONG = ({"prompt": "a", "output": text} for text in ("b", "b c d e f g " * 20))


def test_long_conversations_are_dropped_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", SHORT, LONG, SHORT, LONG)
    found = load_samples(path, tokenizer, sequence_length=40)
    assert [sample.line for sample in found] == [1, 3]
    account = found.account
    assert (account.records, account.samples, account.dropped, account.truncated) == (4, 2, 2, 0)
    assert (account.tokens, account.learned_tokens) == (2 * len(found.samples[0]), 2 * found.samples[0].learned)
    assert "2 dropped as too long (lines 2, 4)" in account.describe()


def test_long_conversations_are_cut_at_the_end_on_request(tmp_path: Path, tokenizer: Any) -> None:
    whole = load(tmp_path / "b.jsonl", tokenizer, LONG)[0]
    asked = {"prompt": "b c d e f g " * 20, "output": "b"}
    path = write(tmp_path / "a.jsonl", SHORT, LONG, asked)
    found = load_samples(path, tokenizer, sequence_length=40, too_long="truncate")
    assert (found.samples[1].ids, found.samples[1].labels) == (whole.ids[:40], whole.labels[:40])
    # Nothing of the last one's answer lies within 40 tokens, so there is nothing to learn from it.
    assert (len(found), found.account.truncated, found.account.dropped) == (2, 1, 1)


def test_long_conversations_are_refused_by_line_on_request(tmp_path: Path, tokenizer: Any) -> None:
    rows = (SHORT, LONG, SHORT, LONG)
    with pytest.raises(InputError, match="2 of 4 samples are longer than sequence_length, 40") as error:
        load(tmp_path / "a.jsonl", tokenizer, *rows, length=40, too_long="error")
    assert error.value.where.endswith("lines 2, 4")
    longest = max(map(len, load(tmp_path / "a.jsonl", tokenizer, LONG)))
    assert f"--sequence-length {longest}" in error.value.fix
    with pytest.raises(InputError, match="longer than the model's context, 40") as error:
        load(tmp_path / "a.jsonl", tokenizer, LONG, context=40, too_long="error")
    assert "shorten or remove" in error.value.fix


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_dropping_every_sample_is_an_error(tmp_path: Path, tokenizer: Any, too_long: str) -> None:
    with pytest.raises(InputError, match="2 of 2 samples are longer than sequence_length, 4 tokens"):
        load(tmp_path / "a.jsonl", tokenizer, LONG, LONG, length=4, too_long=too_long)


def test_a_conversation_beyond_every_model_is_dropped_unread(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qalora_export.data.records.MAX_CHARACTERS", 20)
    found = load_samples(write(tmp_path / "a.jsonl", SHORT, LONG), tokenizer, sequence_length=512)
    assert (len(found), found.account.dropped) == (1, 1)


def test_a_text_file_in_pieces_gives_the_tokens_of_the_whole(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"Turn on light {n}, please!\n" for n in range(60))
    path = write(tmp_path / "a.txt", text)
    whole = load_samples(path, tokenizer, sequence_length=64)
    monkeypatch.setattr(lines, "PIECE", 100)
    monkeypatch.setattr("qalora_export.data.rendering.PIECE", 100)
    pieces = load_samples(path, tokenizer, sequence_length=64)
    assert [(s.ids, s.labels) for s in pieces] == [(s.ids, s.labels) for s in whole]
    assert (pieces.account.records, whole.account.records) == (1, 1)
    assert [i for s in whole for i in s.ids] == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


def test_answers_of_weight_zero_are_read_but_not_learned(tmp_path: Path, tokenizer: Any) -> None:
    talk = [*TALK[:2], TALK[2] | {"weight": 0}, *TALK[3:]]
    for template in (tokenizer.chat_template, MARKED):
        tokenizer.chat_template = template
        (sample,) = load(tmp_path / "a.jsonl", tokenizer, {"messages": talk})
        assert learned(sample, tokenizer) == ["done\n  twice<|end|>"]


TOOLS = (
    "{% if tools %}<|system|>\n{{ tools | tojson }}<|end|>\n{% endif %}{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{{ m['content'] }}{% for c in m['tool_calls'] or [] %}{{ ARGUMENTS }}{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.parametrize(
    "arguments", ["c.function.arguments | tojson", "c['function']['arguments'] + ''"], ids=["object", "text"]
)
def test_tools_and_their_calls_reach_the_template(tmp_path: Path, tokenizer: Any, arguments: str) -> None:
    tokenizer.chat_template = TOOLS.replace("ARGUMENTS", arguments)
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    turns = [TALK[1], {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "3"}]
    (sample,) = load(tmp_path / "a.jsonl", tokenizer, {"messages": turns, "tools": [{"name": "f"}]})
    assert learned(sample, tokenizer) == ['{"x": 1}<|end|>']
    assert '[{"name": "f"}]' in tokenizer.decode(sample.ids)


def test_template_options_may_not_reach_past_the_template(tmp_path: Path, tokenizer: Any) -> None:
    row = {"prompt": "a", "output": "b", "chat_template_kwargs": {"return_tensors": "pt"}}
    with pytest.raises(InputError, match="sets 'return_tensors'"):
        load(tmp_path / "a.jsonl", tokenizer, row)


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
    tokenizer.chat_template = "{% for m in messages if m['role'] == 'nobody' %}x{% endfor %}"  # no token at all
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
