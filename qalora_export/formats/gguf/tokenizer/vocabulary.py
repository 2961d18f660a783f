"""What every kind of tokenizer has in common: tokens by id, their types, padding to the embedding's rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qalora_export.errors import InputError
from qalora_export.formats.gguf.metadata import Entry
from qalora_export.formats.gguf.tokenizer.token_types import (
    CONTROL,
    KEEPS_SPACE,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """tokens[i] and types[i] of id i, padded to the embedding's rows. model, pre: llama.cpp's names.

    own: the entries that only this kind has (merges, scores, switches).
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    own: list[Entry]

    def entries(self) -> list[Entry]:
        return [
            Entry("tokenizer.ggml.model", "string", self.model),
            Entry("tokenizer.ggml.pre", "string", self.pre),
            Entry("tokenizer.ggml.tokens", "array", self.tokens),
            Entry("tokenizer.ggml.token_type", "array", self.types),
            *self.own,
        ]


def with_configured_tokens(raw: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.json with the added tokens that tokenizer_config.json alone declares, as Transformers loads both.

    Those are the entries of `added_tokens_decoder`, and the tokens of the named roles, which are special.
    """
    added = [dict(item) for item in raw.get("added_tokens") or []]
    known = {item["content"] for item in added}
    decoder = settings.get("added_tokens_decoder") or {}
    listed = [{"id": int(index), **item} for index, item in sorted(decoder.items(), key=lambda pair: int(pair[0]))]
    ids = dict(raw["model"]["vocab"]) if isinstance(raw["model"]["vocab"], Mapping) else {}
    ids |= {item["content"]: item["id"] for item in (*added, *listed)}
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    roles = [*(settings.get(role) for role in ROLES), *(more.values() if isinstance(more, Mapping) else more)]
    for token in roles:
        text = token.get("content") if isinstance(token, Mapping) else token
        if text is not None and text in ids:
            listed.append({"id": ids[text], "content": text, "special": True})
    for item in listed:
        if item["content"] not in known:
            known.add(item["content"])
            added.append(item)
    return {**raw, "added_tokens": added}


def numbered(vocab: Mapping[str, Any], added: list[Any], rows: int) -> dict[int, str]:
    """id → token text over the model's vocabulary and the added tokens. Raises InputError for contradictions."""
    tokens: dict[int, str] = {}
    pairs = [*vocab.items(), *((item["content"], item["id"]) for item in added)]
    for text, index in pairs:
        if type(index) is not int or not 0 <= index < rows:
            raise InputError(
                f"token {text!r} has id {index!r}, the embedding has {rows} rows",
                where="tokenizer.json",
                fix="resize the model's embedding or fix vocab_size",
            )
        if tokens.setdefault(index, text) != text:
            raise InputError(
                f"id {index} belongs to {tokens[index]!r} and {text!r}",
                where="tokenizer.json, or tokenizer_config.json: added_tokens_decoder",
                why="Transformers gives the second one an id of its own, for which the model has no row",
                fix=f"if the model was trained with {text!r}, rename the first in tokenizer.json and list it in "
                "added_tokens there",
            )
    return tokens


def token_types(tokens: Mapping[int, str], added: list[Any], rows: int, unknown: str | None = None) -> list[int]:
    """llama.cpp's type of each id. unknown: text of the unknown token.

    Raises InputError for added tokens that match more than their own text, unless it is the way llama.cpp gives
    models named Phi-3: behind every special token but KEEPS_SPACE, white space is dropped.
    """
    types = [NORMAL if index in tokens else UNUSED for index in range(rows)]
    strips = strips_spaces(added)
    for item in added:
        odd = [key for key in ("single_word", "lstrip", "rstrip") if item.get(key)]
        if odd and not (strips and odd == ["rstrip"]):
            raise InputError(
                f"added token {item['content']!r} uses {', '.join(odd)}",
                where="tokenizer.json: added_tokens",
                why="llama.cpp matches added tokens as plain text only; white space behind them it drops for models "
                "named Phi-3, and then behind every one but <unk>, <s> and <|endoftext|>",
            )
        types[item["id"]] = CONTROL if item.get("special") else USER_DEFINED
    for index, text in tokens.items():
        if text == unknown:
            types[index] = UNKNOWN
    return types


def strips_spaces(added: list[Any]) -> bool:
    """Whether added tokens drop the white space behind them, exactly as llama.cpp does for Phi-3."""
    texts = {item["content"] for item in added}
    strip = {item["content"] for item in added if item.get("rstrip")}
    return bool(strip) and strip == texts - KEEPS_SPACE and {*KEEPS_SPACE, "</s>"} <= texts


def padded(tokens: Mapping[int, str], rows: int) -> list[str]:
    """Tokens in the order of their ids; ids without a token become "[PAD<id>]". Raises InputError for doubles."""
    ordered = [tokens.get(index, f"[PAD{index}]") for index in range(rows)]
    read = [text.partition("\0")[0] for text in ordered]  # llama.cpp reads C strings
    named = [text for text in read if text]
    if len(set(named)) != len(named):
        raise InputError("two token ids have the same text", where="tokenizer.json: model.vocab")
    return ordered


def merge_rules(raw: Any, vocab: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Merge rules in rank order. tokenizer.json spells them as strings or as pairs. Raises InputError."""
    pairs = [tuple(rule.split(" ")) if isinstance(rule, str) else tuple(rule) for rule in raw or []]
    for rank, pair in enumerate(pairs):
        if len(pair) != 2 or any(" " in part for part in pair) or "".join(pair) not in vocab:
            raise InputError(
                f"merge rule {rank} does not join two tokens into a third: {pair!r}",
                where="tokenizer.json: model.merges",
            )
    if len(set(pairs)) != len(pairs):
        raise InputError("a merge rule is repeated", where="tokenizer.json: model.merges")
    return [(left, right) for left, right in pairs]
