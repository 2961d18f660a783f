"""GGUF tokenizer metadata → tokenizer.json and its companions, with the ids that llama.cpp gives on the same file.

The inverse of fields.py for files of any tool. What llama.cpp does is the meaning of such a file: it normalizes
nothing, so a Unicode normalization that the model's first tokenizer may have had is not restored.

SentencePiece vocabularies ("llama") hold scores instead of merge rules. Hugging Face's BPE wants rules, so every way
of joining two tokens into a third becomes one, ranked by the third's score, as Transformers converts such models. Where
two ways to one token overlap in a text ("aaa" as a|aa and aa|a), llama.cpp takes the leftmost and BPE the higher rank:
runs of one character can come out differently.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from qalora_export.errors import InputError
from qalora_export.formats.gguf.tokenizer.pretokenizer import NAMED, NOT_NAMED, byte_level_json
from qalora_export.formats.gguf.tokenizer.token_types import (
    BYTE_TOKEN,
    CONTROL,
    PADDING,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    effective_types,
    strips_right,
)

SPACE = "▁"
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # llama.cpp's defaults for type "llama"
RAW_BPE = ("gemma4", "granite-embed-multi-311m", "sarvam-moe")  # merge rules over characters instead of bytes


class _Fields:
    """Typed access to the metadata. Raises InputError for what is absent or of another type."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._fields.get(f"tokenizer.{key}", default)
        if value is not default and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise InputError(f"tokenizer.{key} is a {type(value).__name__}, not {kind.__name__}", where="GGUF metadata")
        return value

    def array(self, key: str, kind: type, length: int | None = None) -> list[Any]:
        values = self._fields.get(f"tokenizer.{key}")
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise InputError(f"tokenizer.{key} is not an array of {kind.__name__}", where="GGUF metadata")
        if length is not None and len(values) != length:
            raise InputError(f"tokenizer.{key} has {len(values)} entries, not {length}", where="GGUF metadata")
        return values


def tokenizer_files_from_gguf(fields: Mapping[str, Any]) -> dict[str, bytes]:
    """Files of a tokenizer that Transformers loads: name → content.

    fields: every metadata key of a validated GGUF file → its Python value (str, int, float, bool or a list of those).
    Written are tokenizer.json, tokenizer_config.json (special tokens, chat template) and generation_config.json (all
    end tokens). Ids without a token ("[PAD7]") stay without one, so the embedding may have more rows than that.
    Raises InputError when llama.cpp's type of tokenizer has no exact counterpart here, or the metadata is malformed.
    """
    meta = _Fields(fields)
    texts = [text.partition("\0")[0] for text in meta.array("ggml.tokens", str)]  # llama.cpp reads C strings
    tokens = [text or f"[EMPTY_{index}]" for index, text in enumerate(texts)]
    if len(set(tokens)) != len(tokens):
        raise InputError("two token ids have the same text", where="GGUF metadata: tokenizer.ggml.tokens")
    declared = meta.array("ggml.token_type", int, len(tokens))
    types = effective_types(tokens, declared)
    vocab = {
        text: index
        for index, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if not (kind == UNUSED and PADDING.fullmatch(text))
    }
    build = _builder(meta.get("ggml.model", str, ""), meta.get("ggml.pre", str, "default"))
    raw, add_bos = build(meta, vocab, types)
    special = _special_ids(meta, len(tokens), raw["model"]["byte_fallback"])
    raw["added_tokens"] = _added_tokens(tokens, types, str(fields.get("general.name", "")))
    raw["post_processor"] = _post_processor(
        tokens,
        special["bos"] if meta.get("ggml.add_bos_token", bool, add_bos) else None,
        special["eos"] if meta.get("ggml.add_eos_token", bool, False) else None,
    )
    generation = _generation(special)
    return {
        "tokenizer.json": _json(raw),
        "tokenizer_config.json": _json(_settings(meta, tokens, special)),
        **({"generation_config.json": _json(generation)} if generation else {}),
    }


def _builder(model: str, pre: str) -> Any:
    if model == "gemma4" or (model == "gpt2" and pre in RAW_BPE):
        return _raw_bpe
    if model == "llama":
        return _sentencepiece
    if model == "gpt2" and pre in NAMED:
        return _byte_level
    raise InputError(
        f"tokenizer {model!r} with pre-tokenizer {pre!r} has no known counterpart in Hugging Face's form",
        where="GGUF metadata: tokenizer.ggml",
        why=NOT_NAMED.get(pre, "") or f"known: llama, gemma4, and gpt2 with {', '.join(sorted(NAMED))}",
        fix="give the folder of the original model as the source",
    )


def _byte_level(meta: _Fields, vocab: Mapping[str, int], _types: list[int]) -> tuple[dict[str, Any], bool]:
    named = NAMED[meta.get("ggml.pre", str, "default")]
    raw = _document(
        vocab,
        _merge_rules(meta.array("ggml.merges", str), vocab),
        pre_tokenizer=byte_level_json(named.splits),
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    )
    raw["model"]["ignore_merges"] = named.ignore_merges
    return raw, named.add_bos


def _sentencepiece(meta: _Fields, vocab: Mapping[str, int], types: list[int]) -> tuple[dict[str, Any], bool]:
    scores = meta.array("ggml.scores", float, len(types))
    if not all(math.isfinite(score) for score in scores):
        raise InputError("a token's score is not a number", where="GGUF metadata: tokenizer.ggml.scores")
    prefix = meta.get("ggml.add_space_prefix", bool, True)
    raw = _document(
        vocab,
        _rules_of_scores({text: index for text, index in vocab.items() if types[index] != CONTROL}, scores),
        normalizer=_space_normalizer(prefix=prefix),
        decoder=_space_decoder(prefix=prefix),
    )
    return _with_byte_fallback(raw, vocab, types), True


def _raw_bpe(meta: _Fields, vocab: Mapping[str, int], types: list[int]) -> tuple[dict[str, Any], bool]:
    lines = {"type": "Split", "pattern": {"Regex": "[^\\n]+|[\\n]+"}, "behavior": "Isolated", "invert": False}
    raw = _document(
        vocab,
        _merge_rules(meta.array("ggml.merges", str), vocab),
        normalizer=_space_normalizer(prefix=False),
        pre_tokenizer=lines,
        decoder=_space_decoder(prefix=False),
    )
    pre = "gemma4" if meta.get("ggml.model", str) == "gemma4" else meta.get("ggml.pre", str)
    return _with_byte_fallback(raw, vocab, types), pre == "gemma4"


def _document(vocab: Mapping[str, int], merges: list[list[str]], **parts: Any) -> dict[str, Any]:
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": dict(vocab),
        "merges": merges,
    }
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", "added_tokens": [], **empty, **parts, "model": model}


def _with_byte_fallback(raw: dict[str, Any], vocab: Mapping[str, int], types: list[int]) -> dict[str, Any]:
    unknown = next((text for text, index in vocab.items() if types[index] == UNKNOWN), None)
    if unknown is None and not any(BYTE_TOKEN.fullmatch(text) for text in vocab):
        raise InputError("neither an unknown token nor byte tokens", where="GGUF metadata: tokenizer.ggml.tokens")
    raw["model"] |= {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True}
    return raw


def _merge_rules(raw: list[str], vocab: Mapping[str, int]) -> list[list[str]]:
    """Pairs from "left right"; like llama.cpp, the first space behind the first character parts them."""
    rules = []
    for rank, rule in enumerate(raw):
        cut = rule.find(" ", 1)
        left, right = rule[:cut], rule[cut + 1 :]
        if cut < 0 or left not in vocab or right not in vocab or left + right not in vocab:
            raise InputError(
                f"merge rule {rank} does not join two tokens into a third: {rule!r}",
                where="GGUF metadata: tokenizer.ggml.merges",
            )
        rules.append([left, right])
    return rules


def _rules_of_scores(vocab: Mapping[str, int], scores: list[float]) -> list[list[str]]:
    """Every split of a token into two tokens: better scores first, then the longer left part."""
    rules = [
        (-scores[index], -cut, text)
        for text, index in vocab.items()
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    ]
    rules.sort(key=lambda rule: rule[:2])
    return [[text[:-cut], text[-cut:]] for _, cut, text in rules]


def _space_normalizer(*, prefix: bool) -> dict[str, Any]:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps = [{"type": "Prepend", "prepend": SPACE}, replace] if prefix else [replace]
    return {"type": "Sequence", "normalizers": steps}


def _space_decoder(*, prefix: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _added_tokens(tokens: list[str], types: list[int], model_name: str) -> list[dict[str, Any]]:
    plain = dict.fromkeys(("single_word", "lstrip", "normalized"), False)
    return [
        {
            "id": index,
            "content": text,
            **plain,
            "rstrip": strips_right(model_name, text),
            "special": kind != USER_DEFINED,
        }
        for index, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]


def _post_processor(tokens: list[str], bos: int | None, eos: int | None) -> dict[str, Any] | None:
    if bos is None and eos is None:
        return None
    marks = {index: {"SpecialToken": {"id": tokens[index], "type_id": 0}} for index in (bos, eos) if index is not None}
    before, after = ([marks[bos]] if bos is not None else []), ([marks[eos]] if eos is not None else [])
    texts = [{"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B")]
    return {
        "type": "TemplateProcessing",
        "single": [*before, texts[0], *after],
        "pair": [*before, texts[0], *after, *before, texts[1], *after],
        "special_tokens": {
            tokens[index]: {"id": tokens[index], "ids": [index], "tokens": [tokens[index]]} for index in marks
        },
    }


def _special_ids(meta: _Fields, count: int, sentencepiece: bool) -> dict[str, int | None]:
    """Role → id, as llama.cpp understands the file: an id outside the vocabulary is none."""
    defaults = SENTENCEPIECE_IDS if sentencepiece and meta.get("ggml.model", str) == "llama" else {}
    found = {
        role: meta.get(f"ggml.{role}_token_id", int, defaults.get(role))
        for role in ("bos", "eos", "unknown", "padding", "eot", "eom")
    }
    return {role: index if index is not None and 0 <= index < count else None for role, index in found.items()}


def _settings(meta: _Fields, tokens: list[str], special: Mapping[str, int | None]) -> dict[str, Any]:
    ids = {name: special[role] for name, role in ROLES.items()}
    named = {name: tokens[index] for name, index in ids.items() if index is not None}
    template = _chat_template(meta)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **named,
        **({"chat_template": template} if template is not None else {}),
    }


def _chat_template(meta: _Fields) -> Any:
    default = meta.get("chat_template", str)
    names = meta.array("chat_templates", str) if meta.get("chat_templates", list) else []
    if not names:
        return default
    others = {name: meta.get(f"chat_template.{name}", str, "") for name in names}
    listed = {"default": default, **others} if default is not None else others
    return [{"name": name, "template": text} for name, text in listed.items()]


def _generation(special: Mapping[str, int | None]) -> dict[str, Any]:
    ends = [special[role] for role in ("eos", "eot", "eom") if special[role] is not None]
    unique = list(dict.fromkeys(ends))
    found = {
        "bos_token_id": special["bos"],
        "eos_token_id": (unique[0] if len(unique) == 1 else unique) or None,
        "pad_token_id": special["padding"],
    }
    return {key: value for key, value in found.items() if value is not None}


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode("utf-8")
