"""SentencePiece's unigram model from tokenizer.json: a score for each piece, the best-scoring way through a text; "t5".

llama.cpp joins white space into one ▁ before each word and drops what is left at the end, and it knows no bytes: a
character without a piece becomes the unknown token. A tokenizer that does otherwise is refused.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from qalora_export.errors import InputError
from qalora_export.formats.gguf.metadata import Entry
from qalora_export.formats.gguf.tokenizer.vocabulary import Vocabulary, numbered, padded, token_types

SPACE = "▁"
UNUSED_SCORE = -10000.0  # as llama.cpp's converter pads


def unigram_vocabulary(raw: Mapping[str, Any], rows: int) -> Vocabulary:
    """Tokens, types and scores of a parsed tokenizer.json; `rows`: rows of the embedding matrix. Raises InputError."""
    model, added = raw["model"], raw.get("added_tokens") or []
    if model.get("byte_fallback"):
        raise InputError(
            "a unigram tokenizer with byte_fallback is not supported",
            where="tokenizer.json: model",
            why="llama.cpp's unigram tokenizer writes the unknown token where this one writes bytes",
        )
    pieces = {text: index for index, (text, _) in enumerate(model["vocab"])}
    if len(pieces) != len(model["vocab"]):
        raise InputError("two token ids have the same text", where="tokenizer.json: model.vocab")
    _check_words(raw, pieces)
    charsmap = _charsmap(raw.get("normalizer"))
    tokens = numbered(pieces, added, rows)
    unknown = model["vocab"][model["unk_id"]][0]
    scores = [float(score) for _, score in model["vocab"]] + [UNUSED_SCORE] * (rows - len(pieces))
    ordered = padded(tokens, rows)
    own = [
        Entry("tokenizer.ggml.scores", "array", scores),
        Entry("tokenizer.ggml.unknown_token_id", "uint32", model["unk_id"]),
        Entry("tokenizer.ggml.add_space_prefix", "bool", True),
        Entry("tokenizer.ggml.remove_extra_whitespaces", "bool", True),
    ]
    if charsmap:
        own.append(Entry("tokenizer.ggml.precompiled_charsmap", "array", charsmap))
    return Vocabulary("t5", "default", ordered, token_types(tokens, added, rows, unknown), own)


def _check_words(raw: Mapping[str, Any], pieces: Mapping[str, int]) -> None:
    """Words must be parted at white space, each with one ▁ in front, as llama.cpp does it."""
    pre = raw.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    last = steps[-1]
    spaced = last.get("type") == "Metaspace" and last.get("replacement") == SPACE
    always = spaced and last.get("prepend_scheme", "always") == "always"
    if not always or [step.get("type") for step in steps[:-1]] != ["WhitespaceSplit"]:
        raise InputError(
            "llama.cpp does not treat spaces in this way",
            where="tokenizer.json: pre_tokenizer",
            why=f"its unigram tokenizer joins white space and puts one ▁ before each word; found {str(pre)[:200]}",
        )
    crossing = next((text for text in pieces if SPACE in text[1:]), None)
    if crossing is not None:
        raise InputError(
            f"token {crossing!r} reaches over a space",
            where="tokenizer.json: model.vocab",
            why="words are parted at every space, so it would come out in llama.cpp and never here",
        )


def _charsmap(normalizer: Any) -> list[int]:
    """Bytes of the compiled table of replacements, none without a normalizer."""
    if normalizer in (None, {"type": "Sequence", "normalizers": []}):
        return []
    if normalizer.get("type") == "Sequence" and len(normalizer["normalizers"]) == 1:
        return _charsmap(normalizer["normalizers"][0])
    if normalizer.get("type") != "Precompiled":
        raise InputError(
            "the tokenizer normalizes text",
            where="tokenizer.json: normalizer",
            why=f"llama.cpp's unigram tokenizer has a compiled table only: {str(normalizer)[:200]}",
        )
    return list(base64.b64decode(normalizer["precompiled_charsmap"], validate=True))
