"""Files as rows or text: bounded lines, byte order marks, line ends, arrays, and what is refused by name."""

import json
from pathlib import Path

import pytest

from qalora_export.data import lines
from qalora_export.errors import InputError, UnsafeInputError


def numbered(path: Path) -> list[tuple[int, dict]]:
    return [(number, row) for number, _, row in lines.rows(path)]


def test_blank_lines_a_byte_order_mark_and_crlf_are_skipped_but_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n \n{"b": "c\\r\\n"}')
    assert numbered(path) == [(1, {"a": 1}), (4, {"b": "c\r\n"})]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert list(lines.pieces(tmp_path / "a.txt")) == [(1, "one\ntwo\n")]


def test_a_json_array_is_read_by_item_and_json_may_hold_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"a": 1}, {"b": 2}], indent=1))
    assert numbered(path) == [(1, {"a": 1}), (2, {"b": 2})]
    path.write_text('{"a": 1}\n{"b": 2}\n')
    assert numbered(path) == [(1, {"a": 1}), (2, {"b": 2})]
    path.write_text('[{"a": 1}, 2]')
    with pytest.raises(InputError, match=r"not a JSON object.*a\.json, item 2"):
        numbered(path)


def test_a_line_above_the_bound_is_refused_with_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n' + '{"a": "' + "x" * 3_000_000 + '"}\n{"b": 2}\n')
    with pytest.raises(UnsafeInputError, match=r"a line of 3,000,010 bytes is longer than 100.*line 2"):
        numbered(path)
    path.write_bytes(b"x" * 100)  # at the bound it is read: here, and found not to be JSON
    with pytest.raises(InputError, match="not valid JSON"):
        numbered(path)


def test_pieces_of_text_join_to_the_text_and_end_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "PIECE", 50)
    text = "".join(f"line {n}\n" for n in range(1, 40)) + "y" * 300 + "\nlast"
    (tmp_path / "a.txt").write_text(text)
    found = list(lines.pieces(tmp_path / "a.txt"))
    assert "".join(piece for _, piece in found) == text
    assert max(len(piece) for _, piece in found) <= 150
    assert all(piece.startswith(f"line {number}\n") for number, piece in found[:5])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1", r"\.parquet files are not read.*to_json"),
        ("a.csv", b"a,b\n", r"\.csv files are not read"),
        ("a.txt", b"\xff\xfea\x00", "not UTF-8 text.*UTF-16"),
        ("a.jsonl", b"\xfe\xff\x00{", "not UTF-8 text.*UTF-16"),
    ],
)
def test_other_kinds_of_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        lines.is_text(tmp_path / name)


def test_the_kind_follows_from_the_name_or_else_from_the_first_character(tmp_path: Path) -> None:
    for name, content, text in (
        ("a.txt", '{"a": 1}', True),
        ("a.jsonl", "words", False),
        ("a.data", '\n {"a": 1}', False),
        ("a.md", "words", True),
    ):
        (tmp_path / name).write_text(content)
        assert lines.is_text(tmp_path / name) is text


def test_half_a_character_is_refused_where_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud83d\\ude42"}\n{"text": "\\uD83D"}\n')
    with pytest.raises(InputError, match=r"half a character.*line 2.*not valid Unicode"):
        numbered(path)
