"""Calibration text (plain, or JSONL with "text" or chat "messages") → token windows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import InputError
from qalora_export.safety.limits import parse_json

MIN_TOKENS = 32


def calibration_windows(path: Path, tokenizer: Any, *, samples: int, length: int, seed: int) -> NDArray[np.int64]:
    """At most `samples` windows of `length` tokens, int64 (n, length), drawn without replacement by `seed`.

    Documents are put one behind the other and cut; every window starts with BOS when the tokenizer has one it adds.
    A text shorter than one window gives one shorter window. Raises InputError for a missing or empty file, a JSONL
    line that does not parse (with its number), and a text of fewer than 32 tokens.
    """
    prefix = _added_prefix(tokenizer)
    ids = [token for document in _documents(path, tokenizer) for token in document]
    if len(ids) < MIN_TOKENS:
        raise InputError(
            f"the calibration text has only {len(ids)} tokens",
            where=path,
            why=f"GPTQ needs at least {MIN_TOKENS}, some ten thousand to be good",
            fix="give more text of the kind the model will read",
        )
    body = min(length - len(prefix), len(ids))
    if body < 1:
        raise InputError(f"a sequence length of {length} leaves no room for text", where=path, fix="raise it")
    windows = np.array(ids[: len(ids) // body * body], dtype=np.int64).reshape(-1, body)
    order = np.random.default_rng(seed).permutation(len(windows))[:samples]
    chosen = windows[np.sort(order)]
    return np.concatenate([np.tile(np.array(prefix, np.int64), (len(chosen), 1)), chosen], axis=1)


def _added_prefix(tokenizer: Any) -> list[int]:
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer("").input_ids)[:1] == [bos] else []


def _documents(path: Path, tokenizer: Any) -> Iterator[list[int]]:
    if not path.is_file():
        raise InputError("calibration file not found", where=path, fix="give a text or JSONL file, or use method rtn")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError("the calibration file is not UTF-8 text", where=path, why=str(error)) from error
    if not text.strip():
        raise InputError("the calibration file is empty", where=path, fix="give text of the kind the model will read")
    if path.suffix.lower() not in {".jsonl", ".ndjson"}:
        yield tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return
    for number, line in enumerate(text.split("\n"), 1):  # a JSON string may hold other line separators
        if line.strip():
            yield _document(line, tokenizer, where=f"{path}:{number}")


def _document(line: str, tokenizer: Any, *, where: str) -> list[int]:
    row = parse_json(line.encode(), where=where)
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return list(tokenizer(row["text"], add_special_tokens=False, verbose=False).input_ids)
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        return _chat(row["messages"], tokenizer, where=where)
    raise InputError(
        "a line has neither a text nor messages",
        where=where,
        why='expected {"text": "…"} or {"messages": [{"role": …, "content": …}, …]}',
    )


def _chat(messages: list[Any], tokenizer: Any, *, where: str) -> list[int]:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise InputError(
            "a line holds messages but the tokenizer has no chat template", where=where, fix='use {"text": "…"} lines'
        )
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError("the chat template does not accept these messages", where=where, why=str(error)) from error
    return list(tokenizer(rendered, add_special_tokens=False, verbose=False).input_ids)
