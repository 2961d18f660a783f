"""The user's own prompts for the probe set: JSONL (chat, instruction or text) or plain text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.safety.limits import parse_json

MAX_PROMPT_BYTES = 512 * 2**20
JSONL_SUFFIXES = {".jsonl", ".ndjson"}
SHAPES = '{"messages": [{"role", "content"}]}, {"instruction", "output"} or {"text"}'
Prompt = str | list[dict[str, str]]  # running text, or the turns of a conversation


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts in file order.

    JSONL lines are {"messages": [{"role", "content"}…]}, {"instruction", "input"?, "output"?} or {"text"}. Any other
    file is plain text, one prompt per paragraph. Raises InputError naming the line that does not parse, and for a file
    without prompts.
    """
    if not path.is_file():
        raise InputError("prompts file not found", where=path, fix="check --prompts")
    if path.stat().st_size > MAX_PROMPT_BYTES:
        raise UnsafeInputError(f"prompts file is larger than {MAX_PROMPT_BYTES} bytes", where=path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError("prompts file is not UTF-8 text", where=path, why=str(error)) from error
    prompts = _from_jsonl(path, text) if path.suffix in JSONL_SUFFIXES else _from_text(text)
    if not prompts:
        raise InputError("prompts file holds no prompt", where=path, fix="give JSONL or plain text with content")
    return prompts


def _from_text(text: str) -> list[Prompt]:
    return [paragraph.strip("\n") for paragraph in text.split("\n\n") if paragraph.strip()]


def _from_jsonl(path: Path, text: str) -> list[Prompt]:
    lines = enumerate(text.split("\n"), start=1)  # a JSON string may hold other line separators
    return [_prompt(parse_json(line.encode(), where=f"{path}:{n}"), f"{path}:{n}") for n, line in lines if line.strip()]


def _prompt(row: object, where: str) -> Prompt:
    if not isinstance(row, dict):
        raise InputError("a JSONL line is not an object", where=where)
    if isinstance(row.get("text"), str):
        return str(row["text"])
    if isinstance(row.get("instruction"), str):
        request = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
        turns = [{"role": "user", "content": request}]
        if isinstance(row.get("output"), str):
            turns.append({"role": "assistant", "content": row["output"]})
        return turns
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages or not all(map(_is_turn, messages)):
        raise InputError(
            "a JSONL line is neither chat, instruction nor text",
            where=where,
            why=f"its keys are {sorted(row)}"[:200],
            fix=f"use {SHAPES}",
        )
    return [{"role": turn["role"], "content": turn["content"]} for turn in messages]


def _is_turn(turn: object) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)


def token_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Ids of a prompt as the model meets it: conversations through the chat template, text with its BOS."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if not tokenizer.chat_template:
        return list(tokenizer("\n".join(turn["content"] for turn in prompt))["input_ids"])
    rendered = tokenizer.apply_chat_template(prompt, tokenize=False)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def canonical_json(value: object) -> bytes:
    """Bytes that hash the same for equal values."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
