"""The user's own prompts for the probe set, in any format of `records`; a text file gives one prompt per paragraph."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qalora_export.data import lines
from qalora_export.data.records import Record, iter_records
from qalora_export.data.rendering import conversation_text, plain_ids
from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.safety.regular import regular_file

MAX_PROMPT_BYTES = 512 * 2**20


def read_prompts(path: Path) -> list[Record]:
    """Prompts in file order. Raises InputError as records.iter_records does, and for a file without prompts."""
    regular_file(path, "prompts file", fix="check --prompts")
    if path.stat().st_size > MAX_PROMPT_BYTES:
        raise UnsafeInputError(f"prompts file is larger than {MAX_PROMPT_BYTES} bytes", where=path)
    if not lines.is_text(path):
        return list(iter_records(path))
    prompts = list(_paragraphs(path))
    if not prompts:
        raise InputError("prompts file holds no prompt", where=path, fix="give JSONL or plain text with content")
    return prompts


def _paragraphs(path: Path) -> Iterator[Record]:
    number, held = 0, list[str]()
    for first, piece in lines.pieces(path):
        for offset, line in enumerate(piece.split("\n")):
            if line.strip():
                held.append(line)
                number = number or first + offset
            elif held and offset < piece.count("\n"):  # what follows a piece's last line end is the next piece
                yield Record(number, text="\n".join(held), where=f"{path}, line {number}")
                number, held = 0, []
    if held:
        yield Record(number, text="\n".join(held), where=f"{path}, line {number}")


def token_ids(tokenizer: Any, prompt: Record | str) -> list[int]:
    """Ids of a prompt as the model meets it: conversations through the chat template, text with its BOS.

    Without a chat template a conversation is its contents, a line each.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if prompt.text is None and tokenizer.chat_template:
        return plain_ids(tokenizer, prompt_text(tokenizer, prompt))
    return list(tokenizer(prompt_text(tokenizer, prompt))["input_ids"])


def prompt_text(tokenizer: Any, prompt: Record) -> str:
    """A prompt as one text: a conversation as the chat template renders it, without one its contents, a line each."""
    if prompt.text is not None:
        return prompt.text[: lines.PIECE]  # a probe is much shorter
    if not tokenizer.chat_template:
        return "\n".join(message["content"] for message in prompt.messages)[: lines.PIECE]
    return conversation_text(prompt, tokenizer)


def canonical_json(value: object) -> bytes:
    """Bytes that hash the same for equal values."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
