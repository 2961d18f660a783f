"""The turns of a conversation in the one spelling that chat templates read, from the spellings that data sets use.

    OpenAI, TRL       {"role", "content", "tool_calls"?, "name"?, …}; content text, a list of text parts, or null
    ShareGPT          {"from": "human" | "gpt" | "system" | "function_call" | "observation" | …, "value"}

Sources: the documentation of TRL (dataset formats), LLaMA-Factory (data/README), Axolotl (dataset formats), and of
Transformers on tools in chat templates, which take the arguments of a call as an object.
"""

from __future__ import annotations

import json
import re
from typing import Any

Message = dict[str, Any]  # as the template gets it: "role", "content" (a string), and what else the data set carries

# Templates paste the role between control tokens, so a role may not carry any of its own.
ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}
# Keys that say whether an answer is learned (OpenAI: weight 0 or 1; Axolotl: train or training); not for templates.
LEARN_KEYS = ("weight", "train", "training")


class Malformed(ValueError):
    """A turn that cannot be read: (what, why)."""

    def __init__(self, what: str, why: str = "") -> None:
        super().__init__(what)
        self.what, self.why = what, why


def conversation(turns: Any, key: str) -> tuple[tuple[Message, ...], frozenset[int]]:
    """The messages under `key`, and the indices of the answers that the data set says not to learn."""
    if not isinstance(turns, list) or not turns:
        raise Malformed(f"{key!r} is not a list of messages")
    messages, unlearned = list[Message](), set[int]()
    for index, turn in enumerate(turns):
        fields = {k: v for k, v in turn.items() if v is not None} if isinstance(turn, dict) else {}
        spelled = _sharegpt if "from" in fields and "role" not in fields else _openai
        try:
            messages.append(spelled(fields))
            if not _learned(fields):
                unlearned.add(index)
        except Malformed as error:
            raise Malformed(f"message {index + 1} {error.what}", error.why) from error
    return tuple(messages), frozenset(unlearned)


def tools_of(value: Any) -> tuple[dict[str, Any], ...]:
    """Tool descriptions: a list of objects, or that list as JSON text (as LLaMA-Factory and TRL have it)."""
    return _objects(value, "tools")


def documents_of(value: Any) -> tuple[dict[str, Any], ...]:
    """What a template for retrieval gets beside the conversation: a list of objects, in general {"title", "text"}."""
    return _objects(value, "documents")


def _objects(value: Any, name: str) -> tuple[dict[str, Any], ...]:
    if value in (None, "", []):
        return ()
    found = _parsed(value, f"'{name}'")
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise Malformed(f"'{name}' is not a list of objects")
    return tuple(found)


def text_of(content: Any) -> str:
    """Content as one string: text, or text parts joined. Raises Malformed for images and other parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Malformed("needs a string 'role' and a string 'content'", f"content is {type(content).__name__}")
    texts = [
        part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None for part in content
    ]
    strange = [part.get("type") for part in content if isinstance(part, dict) and part.get("type", "text") != "text"]
    if strange or not all(isinstance(text, str) for text in texts):
        raise Malformed(
            "has a part that is not text",
            f"its type is {strange[0]!r}; only text models are trained here"[:200] if strange else "",
        )
    return "".join(text for text in texts if isinstance(text, str))


def _openai(fields: dict[str, Any]) -> Message:
    role = fields.get("role")
    calls = fields.get("tool_calls") or None
    if not isinstance(role, str) or ("content" not in fields and calls is None):
        raise Malformed("needs a string 'role' and a string 'content'", "content may be null only beside tool_calls")
    _check_role(role)
    # A template that pastes a null content would write "None".
    message: Message = {"role": role, "content": text_of(fields.get("content", ""))}
    if calls is not None:
        message["tool_calls"] = _calls(calls)
    rest = {k: v for k, v in fields.items() if k not in ("role", "content", "tool_calls", *LEARN_KEYS)}
    return message | rest


def _sharegpt(fields: dict[str, Any]) -> Message:
    speaker, value = fields.get("from"), fields.get("value")
    if not isinstance(speaker, str) or not isinstance(value, str | list):
        raise Malformed("needs a string 'from' and a string 'value'")
    if speaker not in SHAREGPT_ROLES:
        raise Malformed(f"is from {speaker[:40]!r}", f"known: {', '.join(SHAREGPT_ROLES)}")
    if speaker == "function_call":
        calls = _parsed(value, "the function call")
        return {"role": "assistant", "content": "", "tool_calls": _calls(calls if isinstance(calls, list) else [calls])}
    return {"role": SHAREGPT_ROLES[speaker], "content": text_of(value)}


def _check_role(role: str) -> None:
    if not ROLE.fullmatch(role):
        raise Malformed(f"has the role {role[:40]!r}", "a role is a plain word")


def _calls(calls: Any) -> list[dict[str, Any]]:
    """Tool calls as Transformers' templates take them: {"type": "function", "function": {"name", "arguments"}}."""
    if not isinstance(calls, list):
        raise Malformed("has tool_calls that are not a list")
    found = []
    for call in calls:
        fields = dict(call) if isinstance(call, dict) else {}
        function = fields.get("function", {k: v for k, v in fields.items() if k in ("name", "arguments", "parameters")})
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Malformed("has a tool call without a function name")
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = _parsed(arguments or "{}", "the arguments of a tool call")
        if not isinstance(arguments, dict):
            raise Malformed("has a tool call whose arguments are not an object")
        kept = {k: v for k, v in fields.items() if k in ("id",) and v is not None}
        found.append(kept | {"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return found


def _parsed(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"holds JSON text that does not parse: {what}", str(error)) from error


def _learned(fields: dict[str, Any]) -> bool:
    for key in LEARN_KEYS:
        if key in fields and fields[key] not in (0, 1):  # False and True among them
            raise Malformed(f"has a {key} that is neither 0 nor 1", f"found {str(fields[key])[:40]}")
    return all(fields.get(key, 1) for key in LEARN_KEYS)
