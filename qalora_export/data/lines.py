"""A data file as rows or as running text, read in bounded pieces: JSONL, a JSON array, or plain text.

    .jsonl .ndjson   one JSON object per line
    .json            one array of objects, or lines as above
    .txt             running text
    anything else    JSONL when its first visible character is "{", else running text

UTF-8, with or without a byte order mark; lines end in LF or CRLF; blank lines are skipped but counted.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.safety.limits import MAX_JSON_BYTES, parse_json
from qalora_export.safety.regular import regular_file

MAX_LINE_BYTES = 16 * 2**20  # a line is parsed in memory as a whole; a longer document belongs into a .txt file
PIECE = 2**18  # characters of running text: tokenizing takes some 200 bytes of memory per character
BOM = b"\xef\xbb\xbf"
WIDE_BOMS = (b"\xff\xfe", b"\xfe\xff")
JSON_SUFFIXES = {".jsonl", ".ndjson", ".json"}
FOREIGN = {".parquet", ".arrow", ".csv", ".tsv", ".gz", ".zst", ".xz", ".bz2", ".zip", ".xlsx"}


def is_text(path: Path) -> bool:
    """Whether the file is running text. Raises InputError for one that is missing or of a kind nothing here reads."""
    regular_file(path, "data file")
    suffix = path.suffix.lower()
    if suffix in FOREIGN:
        raise InputError(
            f"{suffix} files are not read",
            where=path,
            fix="convert it to JSONL, for example with datasets.load_dataset(…).to_json(…), or to plain text",
        )
    with path.open("rb") as file:
        begin = file.read(4096)
    if begin.startswith(WIDE_BOMS):
        raise InputError("not UTF-8 text", where=path, why="its byte order mark says UTF-16", fix="save it as UTF-8")
    if suffix in JSON_SUFFIXES or suffix == ".txt":
        return suffix == ".txt"
    return not begin.removeprefix(BOM).lstrip().startswith(b"{")


OnBad = Callable[[InputError], None]  # told of a row that cannot be used; reading goes on behind it


def rows(path: Path, on_bad: OnBad | None = None) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(number, place for messages, JSON object) of every row of a JSON file, one in memory at a time.

    Raises InputError, with the line, for what is not a JSON object or not UTF-8 (unless on_bad takes it),
    UnsafeInputError for a line above MAX_LINE_BYTES and for JSON that two readers could read differently.
    """
    if path.suffix.lower() == ".json" and (items := _array(path)) is not None:
        for number, item in enumerate(items, 1):
            where = f"{path}, item {number}"
            row = None
            with passed_on(on_bad):
                row = _object(item, where, json.dumps(item)[:40])
            if row is not None:
                yield number, where, row
        return
    for number, raw in _lines(path):
        where = f"{path}, line {number}"
        row = None
        with passed_on(on_bad):
            row = _object(parse_json(raw, where=where), where, raw[:40].decode(errors="replace"))
        if row is not None:
            yield number, where, row


@contextlib.contextmanager
def passed_on(on_bad: OnBad | None) -> Iterator[None]:
    """An InputError of the block goes to on_bad, where there is one, and the block ends there."""
    try:
        yield
    except InputError as error:
        if on_bad is None:
            raise
        on_bad(error)


def count(path: Path) -> int | None:
    """How many rows there are to come, for progress; None for text and arrays, which only reading them can tell."""
    if is_text(path) or path.suffix.lower() == ".json":
        return None
    return sum(1 for _ in _lines(path))


def pieces(path: Path) -> Iterator[tuple[int, str]]:
    """(number of its first line, text) of a text file in pieces of about PIECE characters that end where a line ends.

    A line longer than two pieces is cut. Raises InputError for a file that is not UTF-8.
    """
    line, rest = 1, ""
    try:
        with path.open(encoding="utf-8-sig") as file:
            while block := file.read(PIECE):
                text = rest + block
                end = text.rfind("\n") + 1 or (len(text) if len(text) > 2 * PIECE else 0)
                rest = text[end:]
                if end:
                    yield line, text[:end]
                    line += text.count("\n", 0, end)
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8 text", where=path, why=str(error), fix="save it as UTF-8") from error
    if rest:
        yield line, rest


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes without surrounding white space) of the lines that are not blank."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                size = len(raw) + _rest_of_line(file)
                raise UnsafeInputError(
                    f"a line of {size:,} bytes is longer than {MAX_LINE_BYTES:,}",
                    where=f"{path}, line {number}",
                    why="a line is held in memory as a whole",
                    fix="divide it into several lines, or put a long document into a .txt file",
                )
            if number == 1:
                raw = raw.removeprefix(BOM)
            if line := raw.strip():
                yield number, line


def _rest_of_line(file: IO[bytes]) -> int:
    """Bytes up to the next line end, read and thrown away."""
    size = 0
    while part := file.readline(2**20):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


def _array(path: Path) -> list[Any] | None:
    """The items of a JSON file that holds one array; None when it holds lines."""
    with path.open("rb") as file:
        if not file.read(4096).removeprefix(BOM).lstrip().startswith(b"["):
            return None
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UnsafeInputError(
            f"a JSON array is larger than {MAX_JSON_BYTES:,} bytes",
            where=path,
            fix="write one object per line (JSONL), which is read line by line",
        )
    raw = path.read_bytes().removeprefix(BOM)
    items = parse_json(raw, where=path)
    return items if isinstance(items, list) else [items]


def _object(row: Any, where: str, beginning: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError("the line is not a JSON object", where=where, why=f"found {beginning!r}")
    return row
