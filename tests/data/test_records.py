"""Reading training records: formats, detection, and the line number in every complaint."""

import json
from pathlib import Path

import pytest

from qalora_export.data.records import Record, read_records
from qalora_export.errors import InputError

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_formats_are_detected_from_the_first_line(tmp_path: Path) -> None:
    turns = (("user", "hi"), ("assistant", "hello"))
    assert read_records(write(tmp_path / "a.jsonl", CHAT)) == [Record(1, messages=turns)]
    for prompt, answer in (("instruction", "output"), ("prompt", "response"), ("prompt", "completion")):
        assert read_records(write(tmp_path / "a.jsonl", {prompt: "hi", answer: "hello"})) == [Record(1, turns)]
    assert read_records(write(tmp_path / "a.jsonl", {"text": "a b"})) == [Record(1, text="a b")]
    assert read_records(write(tmp_path / "a.txt", "one\n\ntwo\n")) == [Record(1, text="one\n\ntwo\n")]


def test_instruction_input_follows_after_an_empty_line(tmp_path: Path) -> None:
    row = {"instruction": "translate", "input": "Haus", "output": "house"}
    assert read_records(write(tmp_path / "a.jsonl", row))[0].messages[0] == ("user", "translate\n\nHaus")
    assert read_records(write(tmp_path / "a.jsonl", row | {"input": ""}))[0].messages[0] == ("user", "translate")


def test_blank_lines_and_a_byte_order_mark_are_skipped_but_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": "a"}).encode() + b"\r\n\r\n \n" + b'{"text": "b"}')
    assert read_records(path) == [Record(1, text="a"), Record(4, text="b")]


@pytest.mark.parametrize(
    ("rows", "what", "line"),
    [
        ([CHAT, "{broken\n"], "not valid JSON", 2),
        ([CHAT, "[1, 2]\n"], "not a JSON object", 2),
        ([CHAT, "\n", {"text": "a"}], "needs 'messages'", 3),
        ([CHAT, {"messages": []}], "not a list of messages", 2),
        ([CHAT, {"messages": [{"role": "user"}]}], "message 1 needs a string 'role'", 2),
        ([CHAT, {"messages": [{"role": "user", "content": None}]}], "message 1 needs a string 'role'", 2),
        ([CHAT, {"messages": [{"role": "u|><|x", "content": ""}, *CHAT["messages"]]}], "has the role", 2),
        ([CHAT, {"messages": CHAT["messages"][:1]}], "no assistant message", 2),
        ([{"prompt": "a", "output": "b"}, {"prompt": "a"}], "needs 'output' or 'response' or 'completion'", 2),
        ([{"prompt": "a", "output": "b"}, {"prompt": 1, "output": "b"}], "'prompt' is not a string", 2),
        ([{"prompt": "a", "output": "b", "response": "c"}], "only one of them", 1),
        ([{"text": "a"}, {"text": "  "}], "'text' is empty", 2),
        ([{"question": "a"}], "fits no known format", 1),
        ([CHAT | {"text": "a"}], "fits chat and text", 1),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, rows: list[object], what: str, line: int) -> None:
    with pytest.raises(InputError) as error:
        read_records(write(tmp_path / "a.jsonl", *rows))
    assert what in error.value.what
    assert error.value.where.endswith(f"line {line}")


def test_missing_empty_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="data file not found"):
        read_records(tmp_path / "none.jsonl")
    for name, text in (("a.jsonl", "\n \n"), ("a.txt", " \n")):
        with pytest.raises(InputError, match="the data set is empty"):
            read_records(write(tmp_path / name, text))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        read_records(tmp_path / "a.txt")
    with pytest.raises(InputError, match="cannot hold chat records"):
        read_records(write(tmp_path / "a.txt", "x"), "chat")


def test_the_format_can_be_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "output": "b", "text": "a b"})
    assert read_records(path, "text") == [Record(1, text="a b")]
    assert read_records(path, "instruction")[0].messages == (("user", "a"), ("assistant", "b"))
