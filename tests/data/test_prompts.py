"""Probe prompts: the common grammar, a paragraph each from text, and what they are in tokens."""

from pathlib import Path

import pytest

from qalora_export.data.prompts import read_prompts, token_ids
from qalora_export.data.records import Record
from qalora_export.errors import InputError
from qalora_export.models.loading import load_tokenizer
from tests.data.files import write


def test_a_text_file_gives_a_prompt_per_paragraph(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\none\ntwo\n\n \nthree\n")
    assert read_prompts(tmp_path / "a.txt") == [Record(3, text="one\ntwo"), Record(7, text="three")]


def test_what_trains_can_be_a_prompt_answer_included(tmp_path: Path, tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    rows = [{"prompt": "u", "completion": "a"}, {"instruction": "u", "response": "a"}, {"question": "u", "answer": "a"}]
    prompts = read_prompts(write(tmp_path / "a.jsonl", *rows, {"prompt": "u"}))
    talk = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    expected = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=True)["input_ids"]
    assert [token_ids(tokenizer, prompt) for prompt in prompts[:3]] == [expected] * 3
    assert token_ids(tokenizer, prompts[3]) == expected[: len(token_ids(tokenizer, prompts[3]))]
    tokenizer.chat_template = None
    assert token_ids(tokenizer, prompts[0]) == tokenizer("u\na")["input_ids"]


@pytest.mark.parametrize(
    ("content", "place"),
    [("{oops\n", ", line 2"), ('{"txt": "y"}\n', ", line 2"), ("[1]\n", ", line 2")],
)
def test_bad_prompts_name_the_line(tmp_path: Path, content: str, place: str) -> None:
    with pytest.raises(InputError) as caught:
        read_prompts(write(tmp_path / "p.jsonl", {"text": "x"}, content))
    assert caught.value.where.endswith(f"p.jsonl{place}")


def test_absent_and_empty_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="no prompt"):
        read_prompts(write(tmp_path / "a.txt", "\n"))
    with pytest.raises(InputError, match="empty"):
        read_prompts(write(tmp_path / "a.jsonl", "\n"))
