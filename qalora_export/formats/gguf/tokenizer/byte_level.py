"""Byte-level BPE from tokenizer.json: GPT-2's alphabet of bytes, merge rules, llama.cpp's type "gpt2".

A byte without a token is dropped by both sides, so a vocabulary may lack some: thirteen bytes never occur in UTF-8, and
SmolLM2 lacks eight others. NFC is accepted although llama.cpp does not normalize: verify-parity names the texts on
which that shows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qalora_export.errors import InputError
from qalora_export.formats.gguf.metadata import Entry
from qalora_export.formats.gguf.tokenizer.nearest import nearest_name, require_same_cuts
from qalora_export.formats.gguf.tokenizer.pretokenizer import NAMED, identify
from qalora_export.formats.gguf.tokenizer.vocabulary import Vocabulary, merge_rules, numbered, padded, token_types

# Options of a BPE model that llama.cpp does not have, with the values that switch them off.
NEUTRAL = {
    "dropout": (None, 0, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "fuse_unk": (None, False),
    "byte_fallback": (None, False),
}
NORMALIZERS = (
    None,
    {"type": "Sequence", "normalizers": []},
    {"type": "NFC"},
    {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
)


# Beside a pre-tokenizer that is not quite the checkpoint's, and was accepted.
TEXT_DIFFERENCES = "qalora.text_differences"


def byte_level_vocabulary(raw: Mapping[str, Any], rows: int, *, allow_differences: bool = False) -> Vocabulary:
    """Tokens, types and merges of a parsed tokenizer.json; `rows`: rows of the embedding matrix.

    allow_differences: take the nearest form of the pre-tokenizer, and say so in the file.
    """
    model, added = raw["model"], raw.get("added_tokens") or []
    for option, off in NEUTRAL.items():
        if model.get(option) not in off:
            raise InputError(
                f"BPE option {option} = {model[option]!r} is not supported",
                where="tokenizer.json: model",
                why="llama.cpp's byte-level BPE has no such option",
            )
    if raw.get("normalizer") not in NORMALIZERS:
        raise InputError(
            "the tokenizer normalizes text",
            where="tokenizer.json: normalizer",
            why=f"llama.cpp's BPE does not: {str(raw['normalizer'])[:200]}",
        )
    tokens = numbered(model["vocab"], added, rows)
    merges = [" ".join(pair) for pair in merge_rules(model.get("merges"), model["vocab"])]
    pre, accepted = _pre_tokenizer(raw, allow_differences)
    return Vocabulary(
        "gpt2",
        pre,
        padded(tokens, rows),
        token_types(tokens, added, rows, model.get("unk_token")),
        [Entry("tokenizer.ggml.merges", "array", merges), *accepted],
    )


def _pre_tokenizer(raw: Mapping[str, Any], allow_differences: bool) -> tuple[str, list[Entry]]:
    """llama.cpp's name, and what the file says of it."""
    found = identify(raw)
    if found is None and (near := nearest_name(raw)) is not None:
        if allow_differences:
            return near, [Entry(TEXT_DIFFERENCES, "string", f"words are cut as llama.cpp's {near} cuts them")]
        require_same_cuts(raw, near)
        found = near
    if found is None:
        shown = json.dumps(raw.get("pre_tokenizer"), ensure_ascii=False)[:400]
        raise InputError(
            "llama.cpp has no pre-tokenizer that we know to equal this one",
            where="tokenizer.json: pre_tokenizer",
            why=f"found {shown} with ignore_merges = {bool(raw['model'].get('ignore_merges'))}; "
            f"known: {', '.join(sorted(NAMED))}",
            fix="add the expression to formats/gguf/tokenizer/pretokenizer.py together with a test against llama.cpp",
        )
    return found, []
