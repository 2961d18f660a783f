"""Training records from JSONL or plain text: which format a file has, and every way a line can be wrong.

    chat         {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}
    instruction  {"instruction" | "prompt": "...", optional "input": "...", "output" | "response" | "completion": "..."}
    text         {"text": "..."}, or any .txt file, which is one document

"auto" takes the format from the keys of the first line and holds every other line to it. Blank lines are skipped.
Nothing here knows a tokenizer; `samples.py` turns records into token ids.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalora_export.errors import InputError
from qalora_export.safety.limits import parse_json

PROMPT_KEYS = ("instruction", "prompt")
ANSWER_KEYS = ("output", "response", "completion")
# Templates paste the role between control tokens, so a role may not carry any of its own.
ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")

Messages = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Record:
    """One example and the line it came from: (role, content) pairs, or a plain document."""

    line: int
    messages: Messages = ()
    text: str | None = None


def read_records(path: Path, format: str = "auto") -> list[Record]:
    """Every record of a data file, in file order.

    Raises InputError, with the line number, for a file that is missing, empty or not UTF-8, a line that does not parse
    or lacks the format's keys, and values of the wrong type.
    """
    if not path.is_file():
        raise InputError("data file not found", where=path, fix="check the path")
    if path.suffix == ".txt":
        return _document(path, format)
    rows = [(number, _parse(path, number, raw)) for number, raw in _lines(path)]
    if not rows:
        raise InputError("the data set is empty", where=path, fix="give at least one JSON object per line")
    chosen = _detect(path, *rows[0]) if format == "auto" else format
    return [FORMATS[chosen](_Row(path, number, row, chosen)) for number, row in rows]


def _lines(path: Path) -> list[tuple[int, bytes]]:
    """(line number, bytes) of the lines that are not blank; a byte order mark at the start is dropped."""
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    return [(number, line) for number, line in enumerate(raw.split(b"\n"), 1) if line.strip()]


def _parse(path: Path, number: int, raw: bytes) -> dict[str, Any]:
    row = parse_json(raw.strip(), where=f"{path}, line {number}")
    if not isinstance(row, dict):
        raise InputError("the line is not a JSON object", where=f"{path}, line {number}", why=f"found {raw[:40]!r}")
    return row


def _document(path: Path, format: str) -> list[Record]:
    if format not in ("auto", "text"):
        raise InputError(f"a .txt file cannot hold {format} records", where=path, fix="use JSONL, or --format text")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8 text", where=path, why=str(error)) from error
    if not text.strip():
        raise InputError("the data set is empty", where=path, fix="give a file with text in it")
    return [Record(1, text=text)]


@dataclass(frozen=True, slots=True)
class _Row:
    """A parsed line with its place, for errors that name both."""

    path: Path
    number: int
    values: dict[str, Any]
    format: str

    def error(self, what: str, why: str = "") -> InputError:
        return InputError(what, where=f"{self.path}, line {self.number}", why=why, fix=HELP[self.format])

    def string(self, *keys: str) -> str:
        """The value of the one key of `keys` that is there; it must be a string."""
        found = [key for key in keys if key in self.values]
        if len(found) != 1:
            wanted = " or ".join(repr(key) for key in keys)
            raise self.error(
                f"the line needs {wanted}" + (", only one of them" if found else ""),
                f"format {self.format}; its keys are {sorted(self.values)}",
            )
        if not isinstance(value := self.values[found[0]], str):
            raise self.error(f"{found[0]!r} is not a string", f"found {type(value).__name__}")
        return value


def _chat(row: _Row) -> Record:
    if "messages" not in row.values:
        raise row.error("the line needs 'messages'", f"format chat; its keys are {sorted(row.values)}")
    messages = row.values["messages"]
    if not isinstance(messages, list) or not messages:
        raise row.error("'messages' is not a list of messages")
    for index, message in enumerate(messages):
        fields = message if isinstance(message, dict) else {}
        role, content = fields.get("role"), fields.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise row.error(f"message {index + 1} needs a string 'role' and a string 'content'")
        if not ROLE.fullmatch(role):
            raise row.error(f"message {index + 1} has the role {role!r}", "a role is a plain word")
    if all(message["role"] != "assistant" for message in messages):
        raise row.error("the conversation has no assistant message", "there is nothing to learn from it")
    return Record(row.number, messages=tuple((message["role"], message["content"]) for message in messages))


def _instruction(row: _Row) -> Record:
    prompt, answer = row.string(*PROMPT_KEYS), row.string(*ANSWER_KEYS)
    extra = row.string("input") if row.values.get("input") else ""
    user = f"{prompt}\n\n{extra}" if extra else prompt
    return Record(row.number, messages=(("user", user), ("assistant", answer)))


def _text(row: _Row) -> Record:
    if not (text := row.string("text")).strip():
        raise row.error("'text' is empty")
    return Record(row.number, text=text)


FORMATS: dict[str, Callable[[_Row], Record]] = {"chat": _chat, "instruction": _instruction, "text": _text}
HELP = {
    "chat": 'chat lines look like {"messages": [{"role": "user", "content": "..."}, '
    '{"role": "assistant", "content": "..."}]}',
    "instruction": 'instruction lines look like {"instruction": "...", "input": "...", "output": "..."}',
    "text": 'text lines look like {"text": "..."}',
}


def _detect(path: Path, number: int, row: dict[str, Any]) -> str:
    signatures = {
        "chat": "messages" in row,
        "instruction": any(key in row for key in PROMPT_KEYS) and any(key in row for key in ANSWER_KEYS),
        "text": "text" in row,
    }
    matches = [name for name, fits in signatures.items() if fits]
    if len(matches) != 1:
        finding = "fits no known format" if not matches else f"fits {' and '.join(matches)}"
        raise InputError(
            f"the line {finding}",
            where=f"{path}, line {number}",
            why=f"its keys are {sorted(row)}",
            fix="; ".join(HELP.values()) + "; or choose with --format",
        )
    return matches[0]
