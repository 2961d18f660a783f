"""Conversations → text by the model's own chat template, and text → token ids in bounded memory."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator
from typing import Any

from qalora_export.data.lines import PIECE
from qalora_export.data.messages import Message
from qalora_export.data.records import Record
from qalora_export.errors import InputError

# What a template can raise: Jinja's own errors, and Python's from the expressions in it.
PYTHON_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


def render(record: Record, tokenizer: Any, *, until: int | None = None, **options: Any) -> Any:
    """apply_chat_template on the messages before `until` (all without it), with errors that name the line.

    options: arguments of apply_chat_template, e.g. tokenize=True, return_dict=True. Transformers runs the template in
    Jinja's immutable sandbox. Raises InputError for what the template refuses or cannot digest.
    """
    own = {"tools": list(record.tools) or None, "documents": list(record.documents) or None, **record.options}
    if reserved := sorted(set(record.options) & set(inspect.signature(type(tokenizer).apply_chat_template).parameters)):
        raise InputError(
            f"chat_template_kwargs sets {reserved[0]!r}", where=record.where, why="it is not a variable of the template"
        )
    return _applied(list(record.messages[:until]), tokenizer, record.where, own | options)


def _applied(messages: list[Message], tokenizer: Any, where: str, options: dict[str, Any]) -> Any:
    from jinja2.exceptions import TemplateError

    try:
        try:
            return tokenizer.apply_chat_template(messages, **options)
        except (TypeError, TemplateError):  # the second where templates render in a process of their own
            if not any("tool_calls" in message for message in messages):
                raise
            # Some templates (DeepSeek's) paste a call's arguments as text, most take an object.
            return tokenizer.apply_chat_template(_with_text_arguments(messages), **options)
    except (TemplateError, *PYTHON_ERRORS) as error:
        raise InputError(
            "the chat template refuses the conversation",
            where=where,
            why=str(error)[:500],
            fix="check the order of roles the model's template expects",
        ) from error


def _with_text_arguments(messages: list[Message]) -> list[Message]:
    changed = copy.deepcopy(messages)
    for message in changed:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return changed


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text without special tokens around it. A text above PIECE characters is tokenized in pieces.

    A piece ends behind a line end, where a tokenizer's own word boundaries lie too, but a run of blank lines may be
    divided; only documents are that long.
    """
    ids: list[int] = []
    for piece in _cut(text):
        ids += tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
    return ids


def around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer itself puts before and behind a text (BOS, EOS)."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


AS_TEXT = ', or render the conversations yourself into {"text": "..."} lines'


def require_template(record: Record, tokenizer: Any, *, otherwise: str = AS_TEXT) -> None:
    """Raise InputError for a tokenizer without a chat template. otherwise: the second way out, where there is one."""
    if not tokenizer.chat_template:
        raise InputError(
            "the tokenizer has no chat template",
            where=record.where,
            why="chat and instruction data are rendered with the model's own template",
            fix=f"put chat_template.jinja into the model's folder{otherwise}",
        )


def conversation_text(record: Record, tokenizer: Any) -> str:
    """The whole conversation as text. Raises InputError for a tokenizer without a chat template."""
    require_template(record, tokenizer)
    return str(render(record, tokenizer, tokenize=False))


def _cut(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE:
        end = text.rfind("\n", start, start + PIECE) + 1 or start + PIECE
        yield text[start:end]
        start = end
    yield text[start:]
