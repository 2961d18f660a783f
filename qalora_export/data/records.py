"""One grammar for records, whoever reads them: training, validation, calibration, probe prompts, evaluation.

    chat         {"messages": [{"role", "content"}, …]}, or ShareGPT's {"conversations": [{"from", "value"}, …]}
    instruction  {"instruction" | "prompt" | "question": …, optional "input" | "context": …,
                  "output" | "response" | "completion" | "answer": …, optional "history": [[…, …], …]};
                  prompt and completion may also be lists of messages
    text         {"text": …}, or any .txt file, which is one document

Chat and instruction rows may carry "system", "tools", "documents" and "chat_template_kwargs". Other keys are not looked
at. Of a row that fits several formats the first counts (Alpaca's rows have a "text" beside their fields); "format"
settles it otherwise. Each reader says what it needs: training an answer, evaluation a last answer, others only text.

Nothing here knows a tokenizer; `samples.py`, `calibration.py` and `prompts.py` turn records into token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from qalora_export.data import lines
from qalora_export.data.messages import Malformed, Message, conversation, documents_of, text_of, tools_of
from qalora_export.errors import InputError

CHAT_KEYS = ("messages", "conversations")
PROMPT_KEYS = ("instruction", "prompt", "question")
EXTRA_KEYS = ("input", "context")
ANSWER_KEYS = ("output", "response", "completion", "answer")
SYSTEM_KEYS = ("system", "system_prompt")
# What one conversation may hold; more cannot be a sample of any model and would take minutes to tokenize.
MAX_CHARACTERS, MAX_MESSAGES = 2**20, 1024
SHOWN = 5  # rows of a file that an error names
HELP = {
    "chat": 'chat lines look like {"messages": [{"role": "user", "content": "..."}, '
    '{"role": "assistant", "content": "..."}]}',
    "instruction": 'instruction lines look like {"instruction": "...", "input": "...", "output": "..."}',
    "text": 'text lines look like {"text": "..."}',
}


@dataclass(frozen=True, slots=True)
class Record:
    """One example and the line it came from: a conversation (`messages`) or running text (`text`).

    tools: their descriptions, for the chat template; documents: what was retrieved, for templates that show it;
    options: more arguments of the template. unlearned: indices of answers that the data set says not to learn. begins,
    ends: a text file comes in pieces, which are one document.
    """

    line: int
    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    unlearned: frozenset[int] = frozenset()
    begins: bool = True
    ends: bool = True
    where: str = field(default="", compare=False)
    documents: tuple[dict[str, Any], ...] = ()

    @property
    def answers(self) -> list[int]:
        """Indices of the messages that are learned."""
        return [i for i, m in enumerate(self.messages) if m["role"] == "assistant" and i not in self.unlearned]

    @property
    def oversize(self) -> bool:
        """Whether the conversation is beyond what is worth tokenizing."""
        characters = sum(len(message["content"]) for message in self.messages)
        characters += sum(len(value) for document in self.documents for value in document.values() if _is_text(value))
        return characters > MAX_CHARACTERS or len(self.messages) > MAX_MESSAGES

    def need_answer(self) -> None:
        """Raise InputError unless there is something to learn: text, or an assistant's message."""
        if self.text is None and not self.answers:
            raise InputError(
                "the conversation has no assistant message to learn",
                where=self.where,
                why="there is nothing to learn from it" + (": every answer has weight 0" if self.unlearned else ""),
                fix=f"add the answer: {HELP['chat']}, or {HELP['instruction']}",
            )

    def expected(self) -> str:
        """The text of the last answer. Raises InputError when the record does not end in one."""
        last = self.messages[-1] if len(self.messages) > 1 else {}
        if last.get("role") != "assistant" or last.get("tool_calls"):
            raise InputError(
                "the last turn must be the assistant's answer, as text",
                where=self.where,
                why="it is the text that the model's answer is compared with",
                fix=f"{HELP['chat']}, or {HELP['instruction']}",
            )
        return str(last["content"])


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def iter_records(path: Path, format: str = "auto") -> Iterator[Record]:
    """The records of a data file, one in memory at a time.

    Raises InputError, with the line number, for a file that is missing, empty or not UTF-8, a line that does not parse
    or fits no format, and values of the wrong type; UnsafeInputError for a line beyond lines.MAX_LINE_BYTES.
    """
    records = _document(path, format) if lines.is_text(path) else _rows(path, format)
    empty = True
    for record in records:
        empty = False
        yield record
    if empty:
        raise InputError("the data set is empty", where=path, fix="give text, or at least one JSON object per line")


def unusable(
    path: Path, format: str = "auto", *, need: Callable[[Record], object] = lambda _: None, limit: int | None = None
) -> list[InputError]:
    """One error for every row of the first `limit` that `need` or the grammar refuses.

    need: what the reader asks of a record (Record.need_answer, Record.expected). Raises what concerns the whole file.
    """
    bad = list[InputError]()
    records = _document(path, format) if lines.is_text(path) else _rows(path, format, bad.append)
    for record in islice(records, limit):
        with lines.passed_on(bad.append):
            need(record)
    return bad


def in_one(path: Path, bad: list[InputError]) -> InputError:
    """The errors of several rows as one that names the first few."""
    if len(bad) == 1:
        return bad[0]
    shown = [f"{error.where.removeprefix(f'{path}, ')}: {error.what}" for error in bad[:SHOWN]]
    more = [f"and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
    return InputError(f"{len(bad)} lines cannot be used", where=path, why="; ".join([*shown, *more]), fix=bad[0].fix)


def _rows(path: Path, format: str, on_bad: lines.OnBad | None = None) -> Iterator[Record]:
    for number, where, values in lines.rows(path, on_bad):
        row = _Row(number, where, {key: value for key, value in values.items() if value is not None})
        record = None
        with lines.passed_on(on_bad):
            record = _record(row, format)
        if record is not None:
            yield record


def _record(row: _Row, format: str) -> Record:
    chosen = row.detect() if format == "auto" else format
    try:
        return FORMATS[chosen](row)
    except Malformed as error:
        raise row.error(error.what, error.why, chosen) from error


def _document(path: Path, format: str) -> Iterator[Record]:
    if format not in ("auto", "text"):
        raise InputError(f"a text file cannot hold {format} records", where=path, fix="use JSONL, or --format text")
    held: Record | None = None
    for line, text in lines.pieces(path):
        if held is not None:
            yield held
        elif not text.strip():
            continue
        held = Record(line, text=text, begins=held is None, ends=False, where=f"{path}, line {line}")
    if held is not None:
        yield Record(held.line, text=held.text, begins=held.begins, where=held.where)


@dataclass(frozen=True, slots=True)
class _Row:
    """A parsed line with its place, for errors that name both. Keys with null are as if they were not there."""

    number: int
    where: str
    values: dict[str, Any]

    def error(self, what: str, why: str, format: str) -> InputError:
        return InputError(what, where=self.where, why=why, fix=HELP[format])

    def detect(self) -> str:
        answered = any(key in self.values for key in ANSWER_KEYS)
        prompted = any(key in self.values for key in PROMPT_KEYS)
        if any(key in self.values for key in CHAT_KEYS):
            return "chat"
        if answered and (prompted or "input" in self.values):
            return "instruction"
        if "text" in self.values:
            return "text"
        if prompted:
            return "instruction"
        raise InputError(
            "the line fits no known format",
            where=self.where,
            why=f"its keys are {sorted(self.values)}"[:300],
            fix="; ".join(HELP.values()),
        )

    def one(self, keys: tuple[str, ...]) -> str | None:
        """The one key of `keys` that is there. Raises Malformed when there are several."""
        found = [key for key in keys if key in self.values]
        if len(found) > 1:
            raise Malformed(
                f"the line needs {_listed(keys)}, only one of them", f"its keys are {sorted(self.values)}"[:300]
            )
        return found[0] if found else None

    def string(self, keys: tuple[str, ...]) -> str:
        """The value of the one key of `keys` that is there, "" without one; it must be a string."""
        key = self.one(keys)
        value = "" if key is None else self.values[key]
        if not isinstance(value, str):
            raise Malformed(f"{key!r} is not a string", f"found {type(value).__name__}")
        return value

    def record(self, messages: tuple[Message, ...], unlearned: frozenset[int] = frozenset()) -> Record:
        """The conversation with the row's system message in front, its tools and template options."""
        options = self.values.get("chat_template_kwargs", {})
        if not isinstance(options, dict):
            raise Malformed("'chat_template_kwargs' is not an object")
        system = self.string(SYSTEM_KEYS)
        if system and messages[0]["role"] != "system":
            messages = ({"role": "system", "content": system}, *messages)
            unlearned = frozenset(index + 1 for index in unlearned)
        elif system and messages[0]["content"] != system:
            raise Malformed("the line has two different system messages")
        tools, documents = tools_of(self.values.get("tools")), documents_of(self.values.get("documents"))
        return Record(self.number, messages, None, tools, options, unlearned, where=self.where, documents=documents)


def _chat(row: _Row) -> Record:
    key = row.one(CHAT_KEYS)
    if key is None:
        raise Malformed(f"the line needs {_listed(CHAT_KEYS)}", f"its keys are {sorted(row.values)}"[:300])
    return row.record(*conversation(row.values[key], key))


def _instruction(row: _Row) -> Record:
    prompt, answer = row.one(PROMPT_KEYS), row.one(ANSWER_KEYS)
    if prompt is None and "input" not in row.values:
        raise Malformed(f"the line needs {_listed(PROMPT_KEYS)}", f"its keys are {sorted(row.values)}"[:300])
    unlearned = frozenset[int]()
    if prompt is not None and isinstance(row.values[prompt], list):
        messages, _ = conversation(row.values[prompt], prompt)
        # Of a prompt and its completion only the completion is learned, as TRL has it.
        unlearned = frozenset(index for index, message in enumerate(messages) if message["role"] == "assistant")
    else:
        parts = (row.string(PROMPT_KEYS), row.string(EXTRA_KEYS))
        asked = {"role": "user", "content": "\n\n".join(part for part in parts if part)}
        messages = (*_history(row.values.get("history", [])), asked)
    if answer is not None and isinstance(row.values[answer], list):
        more, skipped = conversation(row.values[answer], answer)
        unlearned |= {index + len(messages) for index in skipped}
        messages = (*messages, *more)
    elif answer is not None:
        messages = (*messages, {"role": "assistant", "content": row.string(ANSWER_KEYS)})
    return row.record(messages, unlearned)


def _history(turns: Any) -> Iterator[Message]:
    """LLaMA-Factory's earlier turns: pairs of what was asked and answered."""
    for turn in turns if isinstance(turns, list) else [turns]:
        if not isinstance(turn, list) or len(turn) != 2:
            raise Malformed("'history' is not a list of pairs")
        yield {"role": "user", "content": text_of(turn[0])}
        yield {"role": "assistant", "content": text_of(turn[1])}


def _text(row: _Row) -> Record:
    if "text" not in row.values:
        raise Malformed("the line needs 'text'", f"its keys are {sorted(row.values)}"[:300])
    if not (text := row.string(("text",))).strip():
        raise Malformed("'text' is empty")
    return Record(row.number, text=text, where=row.where)


def _listed(keys: tuple[str, ...]) -> str:
    return " or ".join(repr(key) for key in keys)


FORMATS: dict[str, Callable[[_Row], Record]] = {"chat": _chat, "instruction": _instruction, "text": _text}
