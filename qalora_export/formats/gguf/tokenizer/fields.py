"""Byte-level BPE from tokenizer.json → GGUF tokenizer metadata that llama.cpp reads to the same token ids.

Only what llama.cpp does exactly is accepted; each refusal says what was found. Sources: tokenizers' JSON format,
llama.cpp src/llama-vocab.cpp (impl::load and the BPE session).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalora_export.errors import InputError
from qalora_export.formats.gguf.metadata import Entry
from qalora_export.formats.gguf.tokenizer.pretokenizer import identify
from qalora_export.formats.gguf.tokenizer.special_tokens import SpecialTokens, special_tokens
from qalora_export.safety import inside, read_json

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.h, enum llama_token_type

# Options of a BPE model that llama.cpp does not have, with the values that switch them off.
NEUTRAL = {
    "dropout": (None, 0, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "fuse_unk": (None, False),
    "byte_fallback": (None, False),
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """tokens[i] and types[i] of id i, padded to the embedding's rows; merges as "left right"; pre: llama.cpp's name."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str


def tokenizer_entries(folder: Path, config: Mapping[str, Any]) -> list[Entry]:
    """tokenizer.* entries of the model in `folder`. Raises InputError for anything llama.cpp would do differently."""
    raw = read_json(inside(folder, "tokenizer.json"))
    settings = read_json(inside(folder, "tokenizer_config.json")) if (folder / "tokenizer_config.json").exists() else {}
    if not isinstance(raw, dict) or not isinstance(settings, dict):
        raise InputError("tokenizer files are not JSON objects", where=folder)
    try:
        words = vocabulary(raw, config["vocab_size"])
        special = special_tokens(folder, raw, settings, {token: index for index, token in enumerate(words.tokens)})
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"tokenizer files are malformed: {error!r}",
            where=folder,
            fix="load the tokenizer with Transformers and save it again",
        ) from error
    entries = [
        Entry("tokenizer.ggml.model", "string", "gpt2"),
        Entry("tokenizer.ggml.pre", "string", words.pre),
        Entry("tokenizer.ggml.tokens", "array", words.tokens),
        Entry("tokenizer.ggml.token_type", "array", words.types),
        Entry("tokenizer.ggml.merges", "array", words.merges),
    ]
    return entries + _special_entries(special) + chat_template_entries(folder, settings)


def vocabulary(raw: Mapping[str, Any], rows: int) -> Vocabulary:
    """Tokens, types and merges of a parsed tokenizer.json; `rows`: rows of the embedding matrix."""
    model = raw.get("model")
    if not isinstance(model, Mapping) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), Mapping):
        kind = model.get("type") if isinstance(model, Mapping) else None
        raise InputError(
            f"tokenizer model {kind!r} is not supported", where="tokenizer.json: model", why="supported: byte-level BPE"
        )
    _check_neutral(raw, model)
    tokens = _numbered(model["vocab"], raw.get("added_tokens") or [], rows)
    types = _types(tokens, raw.get("added_tokens") or [], rows)
    for index in range(rows):
        tokens.setdefault(index, f"[PAD{index}]")
    ordered = [tokens[index] for index in range(rows)]
    if len(set(ordered)) != rows:
        raise InputError("two token ids have the same text", where="tokenizer.json: model.vocab")
    return Vocabulary(ordered, types, _merges(model.get("merges"), model["vocab"]), identify(raw))


def chat_template_entries(folder: Path, settings: Mapping[str, Any]) -> list[Entry]:
    """tokenizer.chat_template and, where a model has several, tokenizer.chat_template.<name>."""
    template: Any = settings.get("chat_template")
    if (folder / "chat_template.jinja").exists():
        template = inside(folder, "chat_template.jinja").read_text(encoding="utf-8")
    if template is None:
        return []
    if isinstance(template, str):
        return [Entry("tokenizer.chat_template", "string", template)]
    try:
        named = {item["name"]: item["template"] for item in template}
    except (TypeError, KeyError) as error:
        raise InputError(
            "chat_template is neither text nor a list of named templates", where=folder / "tokenizer_config.json"
        ) from error
    others = {name: text for name, text in named.items() if name != "default"}
    entries = [Entry("tokenizer.chat_template", "string", named["default"])] if "default" in named else []
    entries += [Entry("tokenizer.chat_templates", "array", list(others))] if others else []
    return entries + [Entry(f"tokenizer.chat_template.{name}", "string", text) for name, text in others.items()]


def _check_neutral(raw: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    for option, off in NEUTRAL.items():
        if model.get(option) not in off:
            raise InputError(
                f"BPE option {option} = {model[option]!r} is not supported",
                where="tokenizer.json: model",
                why="llama.cpp's BPE has no such option",
            )
    if raw.get("normalizer") not in (None, {"type": "Sequence", "normalizers": []}):
        raise InputError(
            "the tokenizer normalizes text",
            where="tokenizer.json: normalizer",
            why=f"llama.cpp's BPE does not: {str(raw['normalizer'])[:200]}",
        )
    missing = [byte for byte in byte_alphabet() if byte not in model["vocab"]]
    if missing:
        raise InputError(
            f"{len(missing)} of 256 bytes have no token",
            where="tokenizer.json: model.vocab",
            why="text with such a byte would be tokenized differently by each runtime",
        )


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in of each byte 0..255."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    stand_in = {byte: byte for byte in printable}
    stand_in |= {byte: 256 + n for n, byte in enumerate(b for b in range(256) if b not in stand_in)}
    return [chr(stand_in[byte]) for byte in range(256)]


def _numbered(vocab: Mapping[str, Any], added: list[Any], rows: int) -> dict[int, str]:
    """id -> token text over the model's vocabulary and the added tokens."""
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
            raise InputError(f"id {index} belongs to {tokens[index]!r} and {text!r}", where="tokenizer.json")
    return tokens


def _types(tokens: Mapping[int, str], added: list[Any], rows: int) -> list[int]:
    types = [NORMAL if index in tokens else UNUSED for index in range(rows)]
    for item in added:
        odd = [key for key in ("single_word", "lstrip", "rstrip") if item.get(key)]
        if odd:
            raise InputError(
                f"added token {item['content']!r} uses {', '.join(odd)}",
                where="tokenizer.json: added_tokens",
                why="llama.cpp matches added tokens as plain text only",
            )
        types[item["id"]] = CONTROL if item.get("special") else USER_DEFINED
    return types


def _merges(raw: Any, vocab: Mapping[str, Any]) -> list[str]:
    """Merge rules as "left right", in rank order. tokenizer.json spells them as strings or as pairs."""
    pairs = [tuple(rule.split(" ")) if isinstance(rule, str) else tuple(rule) for rule in raw or []]
    for rank, pair in enumerate(pairs):
        if len(pair) != 2 or any(" " in part for part in pair) or "".join(pair) not in vocab:
            raise InputError(
                f"merge rule {rank} does not join two tokens into a third: {pair!r}",
                where="tokenizer.json: model.merges",
            )
    if len(set(pairs)) != len(pairs):
        raise InputError("a merge rule is repeated", where="tokenizer.json: model.merges")
    return [" ".join(pair) for pair in pairs]


def _special_entries(special: SpecialTokens) -> list[Entry]:
    numbers = {
        "bos_token_id": special.bos,
        "eos_token_id": special.eos,
        "eot_token_id": special.eot,
        "padding_token_id": special.pad,
        "unknown_token_id": special.unk,
    }
    entries = [Entry(f"tokenizer.ggml.{key}", "uint32", value) for key, value in numbers.items() if value is not None]
    entries.append(Entry("tokenizer.ggml.add_bos_token", "bool", special.add_bos))
    entries.append(Entry("tokenizer.ggml.add_eos_token", "bool", special.add_eos))
    return entries
