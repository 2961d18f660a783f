"""JSON from strangers."""

from pathlib import Path

import pytest

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.safety import limits, read_json


def write(folder: Path, raw: bytes) -> Path:
    path = folder / "file.json"
    path.write_bytes(raw)
    return path


def test_reads_unicode(tmp_path: Path) -> None:
    assert read_json(write(tmp_path, '{"é": [1, 2.5, null, "東京"]}'.encode())) == {"é": [1, 2.5, None, "東京"]}
    assert read_json(write(tmp_path, rb'["\uD83D\uDE42", "\\ud800"]')) == ["🙂", r"\ud800"]
    assert read_json(write(tmp_path, b"[" * 100 + b"]" * 100))


BAD = {
    "truncated": (b'{"a": [1, 2', InputError, "not valid JSON"),
    "empty": (b"", InputError, "not valid JSON"),
    "byte order mark": (b'\xef\xbb\xbf{"a": 1}', InputError, "byte order mark"),
    "latin-1": (b'{"a": "\xe9"}', InputError, "not valid JSON"),
    "repeated key": (b'{"a": 1, "a": 2}', UnsafeInputError, "repeats a key"),
    "repeated inner key": (b'{"x": [{"a": 1, "a": 2}]}', UnsafeInputError, "repeats a key"),
    "deep nesting": (b"[" * 200_000 + b"]" * 200_000, UnsafeInputError, "nests too deeply"),
    "nesting that parses": (b'{"a":' * 101 + b"1" + b"}" * 101, UnsafeInputError, "nests too deeply"),
    "half a character": (rb'{"a": ["x\uD800"]}', InputError, "half a character"),
    "half a character in a key": (rb'{"\udc00": 1}', InputError, "half a character"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(tmp_path: Path, case: str) -> None:
    raw, kind, reason = BAD[case]
    with pytest.raises(kind, match=reason):
        read_json(write(tmp_path, raw))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="file not found"):
        read_json(tmp_path / "none.json")


def test_size_is_checked_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_JSON_BYTES", 10)
    with pytest.raises(UnsafeInputError, match="larger than 10 bytes"):
        read_json(write(tmp_path, b'{"a": "0123456789"}'))
