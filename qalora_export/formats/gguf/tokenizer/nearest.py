"""llama.cpp's nearest form of a pre-tokenizer that it does not have, where this vocabulary cannot tell them apart.

Of OpenAI's o200k and Mistral's Tekken it has forms in which only ASCII letters have a case ("NÃO" is cut to NÃ|O) and
combining marks end a word (Hindi, Thai, Arabic with vowel signs). A tokenizer is exported under such a name only when
both forms cut every one of its tokens alike. A token that is cut is the proof of the contrary: alone as a text it is
one id here and several there. The check is necessary, not sufficient; gate G5 of verify-parity asks llama.cpp itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from qalora_export.errors import InputError, refused_by
from qalora_export.formats.gguf.tokenizer.alphabet import byte_alphabet
from qalora_export.formats.gguf.tokenizer.pretokenizer import NAMED, O200K, TEKKEN, byte_level_json, canonical_splits

NEAREST: dict[tuple[tuple[str, ...], bool], str] = {
    ((O200K,), False): "gpt-4o",
    ((O200K,), True): "granite-embed-multi-97m",
    ((TEKKEN,), True): "tekken",
}


def nearest_name(tokenizer: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of the nearest form of this pre-tokenizer; None where it has the same form, or none."""
    splits = canonical_splits(tokenizer.get("pre_tokenizer"))
    return NEAREST.get((splits or (), bool(tokenizer["model"].get("ignore_merges", False))))


def require_same_cuts(tokenizer: Mapping[str, Any], name: str) -> None:
    """Raises InputError with the shortest token that llama.cpp's form of that name would cut."""
    cut = min(_cut_differently(tokenizer, byte_level_json(NAMED[name].splits)), key=len, default=None)
    if cut is not None:
        raise InputError(
            f"llama.cpp cuts words in another way: the text {cut!r} gets other ids",
            where="tokenizer.json: pre_tokenizer",
            why=f"it has this expression only as {name!r}, where letters beyond ASCII have no case and combining marks "
            "end a word",
            fix="export to ONNX, whose runtimes read tokenizer.json itself; or accept other ids for such words with "
            "--allow-text-differences",
        )


def _cut_differently(tokenizer: Mapping[str, Any], pre_tokenizer: dict[str, Any]) -> Iterator[str]:
    """Texts of the tokens that the two pre-tokenizers cut differently; a token that is part of a character has none."""
    from tokenizers import Tokenizer

    bare = {**tokenizer, "normalizer": None, "added_tokens": [], "post_processor": None}
    with refused_by("tokenizers", where="tokenizer.json", doing="read this tokenizer"):
        mine = Tokenizer.from_str(json.dumps(bare)).pre_tokenizer
        other = Tokenizer.from_str(json.dumps({**bare, "pre_tokenizer": pre_tokenizer})).pre_tokenizer
    byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
    added = {item["content"] for item in tokenizer.get("added_tokens") or []}
    for token in tokenizer["model"]["vocab"]:
        try:
            text = bytes(byte_of[character] for character in token if token not in added).decode("utf-8")
        except (KeyError, UnicodeDecodeError):
            continue
        if mine.pre_tokenize_str(text) != other.pre_tokenize_str(text):
            yield text
