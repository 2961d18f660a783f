"""A tokenizer as llama.cpp reads the file we write: where by design it is not quite the tokenizer of the checkpoint.

Three things cannot be said in a GGUF file. It has no Unicode normalization (NFC of Qwen and Command R). llama.cpp takes
some texts for control tokens whenever the vocabulary has them: in Qwen's, "</s>" is a tag of HTML. And it reads tokens
as C strings, which hold no NUL. Each shows only in texts that are not in NFC, that spell such a token out, or that
hold a NUL.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from typing import Any

from qalora_export.formats.gguf.tokenizer.token_types import ENDS, FILL_IN


def as_llama_cpp_reads(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.json without NFC and tokens with NUL, and with the control tokens that llama.cpp sees in it."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    model, ids = tokenizer["model"], _ids(tokenizer)
    if isinstance(model["vocab"], Mapping):
        vocab = {text if "\0" not in text else f"[EMPTY_{index}]": index for text, index in model["vocab"].items()}
        model = {**model, "vocab": vocab, "merges": [rule for rule in model["merges"] if "\0" not in "".join(rule)]}
    taken = [{"id": ids[text], "content": text, **plain, "special": True} for text in taken_for_control(tokenizer)]
    added = sorted([*(tokenizer.get("added_tokens") or []), *taken], key=lambda item: int(item["id"]))
    normalizer = None if _is_nfc(tokenizer) else tokenizer["normalizer"]
    return {**tokenizer, "added_tokens": added, "normalizer": normalizer, "model": model}


def taken_for_control(tokenizer: Mapping[str, Any]) -> list[str]:
    """Texts of ordinary tokens that llama.cpp takes for control tokens."""
    added = {item["content"] for item in tokenizer.get("added_tokens") or []}
    return sorted((ENDS | FILL_IN) & (_ids(tokenizer).keys() - added))


def shows_the_difference(tokenizer: Mapping[str, Any], text: str) -> str | None:
    """Why llama.cpp may read this text differently, None when it must not."""
    if _is_nfc(tokenizer) and not unicodedata.is_normalized("NFC", text):
        return "llama.cpp does not normalize to NFC"
    if "\0" in text and any("\0" in token for token in _ids(tokenizer)):
        return "llama.cpp reads tokens as C strings, which hold no NUL"
    spelled = next((token for token in taken_for_control(tokenizer) if token in text), None)
    return spelled and f"llama.cpp takes {spelled!r} for a control token"


def _ids(tokenizer: Mapping[str, Any]) -> Mapping[str, int]:
    """Token → id of the model; a unigram model lists its tokens with their scores."""
    vocab = tokenizer["model"]["vocab"]
    return vocab if isinstance(vocab, Mapping) else {text: index for index, (text, _) in enumerate(vocab)}


def _is_nfc(tokenizer: Mapping[str, Any]) -> bool:
    return '"NFC"' in json.dumps(tokenizer.get("normalizer"))
