"""One grammar: the formats users of TRL, LLaMA-Factory, Axolotl and OpenAI bring, and the line in every complaint."""

from pathlib import Path
from typing import Any

import pytest

from qalora_export.data import lines
from qalora_export.data.records import Record, iter_records
from qalora_export.errors import InputError
from tests.data.files import write

USER, ANSWER, SYSTEM = ({"role": r, "content": r[0]} for r in ("user", "assistant", "system"))
CHAT = {"messages": [USER, ANSWER]}


def read_records(path: Path, format: str = "auto") -> list[Record]:
    return list(iter_records(path, format))


def read(folder: Path, row: object, format: str = "auto") -> Record:
    (record,) = read_records(write(folder / "a.jsonl", row), format)
    return record


@pytest.mark.parametrize(
    "row",
    [
        CHAT,
        {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
        {"messages": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "u", "output": "a"},
        {"instruction": "u", "input": "", "output": "a", "text": "### u ### a"},
        {"instruction": "", "input": "u", "output": "a", "history": []},
        {"input": "u", "output": "a"},
        {"prompt": "u", "response": "a"},
        {"prompt": "u", "completion": "a", "id": 7},
        {"question": "u", "answer": "a", "system": None},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": [USER], "completion": "a"},
        CHAT | {"text": "u a", "prompt": "u"},
    ],
)
def test_every_spelling_of_one_exchange_is_the_same_record(tmp_path: Path, row: dict[str, Any]) -> None:
    assert read(tmp_path, row) == Record(1, (USER, ANSWER))


def test_input_follows_the_instruction_after_an_empty_line(tmp_path: Path) -> None:
    for extra in ("input", "context"):
        record = read(tmp_path, {"instruction": "translate", extra: "Haus", "output": "house"})
        assert record.messages[0]["content"] == "translate\n\nHaus"


def test_system_tools_and_template_options_come_along(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    documents = [{"title": "a", "text": "b" * 2**20}]
    row = CHAT | {"system": "s", "tools": tools, "documents": documents, "chat_template_kwargs": {"thinking": False}}
    record = read(tmp_path, row)
    assert record.messages == (SYSTEM, USER, ANSWER)
    assert (list(record.tools), record.options) == (tools, {"thinking": False})
    assert list(record.documents) == documents
    assert record.oversize  # they count
    assert read(tmp_path, {"system_prompt": "s", "question": "u", "response": "a"}).messages == (SYSTEM, USER, ANSWER)
    assert read(tmp_path, {"messages": [SYSTEM, USER], "system": "s"}).messages == (SYSTEM, USER)


def test_history_comes_before_the_question_and_is_learned(tmp_path: Path) -> None:
    record = read(tmp_path, {"instruction": "u", "output": "a", "history": [["u", "a"]]})
    assert record.messages == (USER, ANSWER, USER, ANSWER)
    assert record.answers == [1, 3]


def test_of_prompt_and_completion_only_the_completion_is_learned(tmp_path: Path) -> None:
    assert read(tmp_path, {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}).answers == [3]
    weighted = {"messages": [USER, ANSWER | {"weight": 0}, USER, ANSWER], "system": "s"}
    assert read(tmp_path, weighted).answers == [4]


def test_a_text_file_is_one_document_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read_records(tmp_path / "a.txt") == [Record(1, text="one\n\ntwo\n")]
    monkeypatch.setattr(lines, "PIECE", 6)
    first, second = read_records(tmp_path / "a.txt")
    assert (first.begins, first.ends, second.begins, second.ends) == (True, False, False, True)
    assert (first.text, second.text, second.line) == ("one\n\n", "two\n", 3)


def test_formats_may_change_from_line_to_line_and_can_be_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "t"}, CHAT, {"prompt": "u"})
    assert [bool(record.text) for record in read_records(path)] == [True, False, False]
    row = {"prompt": "a", "output": "b", "text": "a b"}
    assert read(tmp_path, row, "text") == Record(1, text="a b")
    assert len(read(tmp_path, row, "instruction").messages) == 2


def test_readers_say_what_they_need(tmp_path: Path) -> None:
    question = read(tmp_path, {"prompt": "u"})
    with pytest.raises(InputError, match=r"no assistant message.*a\.jsonl, line 1.*chat lines look like"):
        question.need_answer()
    with pytest.raises(InputError, match="every answer has weight 0"):
        read(tmp_path, {"messages": [USER, ANSWER | {"weight": 0}]}).need_answer()
    call = ANSWER | {"tool_calls": [{"name": "f", "arguments": {}}]}
    for row in ({"prompt": "u"}, {"text": "t"}, {"messages": [ANSWER]}, {"messages": [USER, call]}):
        with pytest.raises(InputError, match="last turn must be the assistant's answer"):
            read(tmp_path, row).expected()
    record = read(tmp_path, CHAT)
    record.need_answer()
    assert record.expected() == "a"


@pytest.mark.parametrize(
    ("rows", "what", "line"),
    [
        ([CHAT, "{broken\n"], "not valid JSON", 2),
        ([CHAT, "[1, 2]\n"], "not a JSON object", 2),
        ([CHAT, "\n", {"messages": []}], "not a list of messages", 3),
        ([CHAT, {"messages": [{"role": "user"}]}], "message 1 needs a string 'role'", 2),
        ([CHAT, {"conversations": [], "messages": []}], "only one of them", 2),
        ([{"prompt": "a", "output": "b"}, {"prompt": 1, "output": "b"}], "'prompt' is not a string", 2),
        ([{"prompt": "a", "output": "b", "response": "c"}], "only one of them", 1),
        ([{"text": "a"}, {"text": "  "}], "'text' is empty", 2),
        ([{"sentence": "a"}], "fits no known format", 1),
        ([{"prompt": "a", "output": "b", "history": [["a"]]}], "'history' is not a list of pairs", 1),
        ([CHAT | {"tools": "none"}], "does not parse", 1),
        ([CHAT | {"documents": ["text"]}], "'documents' is not a list of objects", 1),
        ([CHAT | {"chat_template_kwargs": 3}], "'chat_template_kwargs' is not an object", 1),
        ([{"messages": [SYSTEM, USER], "system": "other"}], "two different system messages", 1),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, rows: list[object], what: str, line: int) -> None:
    with pytest.raises(InputError) as error:
        read_records(write(tmp_path / "a.jsonl", *rows))
    assert what in error.value.what
    assert error.value.where.endswith(f"a.jsonl, line {line}")


@pytest.mark.parametrize(("format", "row"), [("chat", {"text": "a"}), ("instruction", {"text": "a"}), ("text", CHAT)])
def test_a_chosen_format_says_what_it_misses(tmp_path: Path, format: str, row: object) -> None:
    with pytest.raises(InputError, match="the line needs"):
        read(tmp_path, row, format)


def test_missing_empty_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="data file not found"):
        read_records(tmp_path / "none.jsonl")
    for name, text in (("a.jsonl", "\n \n"), ("a.txt", " \n"), ("a.json", "[]")):
        with pytest.raises(InputError, match="the data set is empty"):
            read_records(write(tmp_path / name, text))
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        read_records(tmp_path / "a.txt")
    with pytest.raises(InputError, match="cannot hold chat records"):
        read_records(write(tmp_path / "a.txt", "x"), "chat")
