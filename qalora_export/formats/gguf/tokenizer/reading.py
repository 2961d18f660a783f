"""A tokenizer as llama.cpp reads the file we write: where by design it is not quite the tokenizer of the checkpoint.

Four things cannot be said in a GGUF file. It has no Unicode normalization (NFC of Qwen and Command R). llama.cpp takes
some texts for control tokens whenever the vocabulary has them: in Qwen's, "</s>" is a tag of HTML. It reads tokens as C
strings, which hold no NUL. And a byte without a token is dropped after the merges, not before: in SmolLM2's vocabulary
">\\x0b<" is two tokens there and "><" here. Each shows only in texts that are not in NFC, that spell such a token out,
or that hold a NUL or such a byte.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from typing import Any

from qalora_export.formats.gguf.tokenizer.alphabet import byte_alphabet
from qalora_export.formats.gguf.tokenizer.nearest import nearest_name
from qalora_export.formats.gguf.tokenizer.pretokenizer import NAMED, byte_level_json
from qalora_export.formats.gguf.tokenizer.token_types import ENDS, FILL_IN
from qalora_export.models.tokenizers import encoder_of


class LlamaCppReading:
    """The tokenizer of a parsed tokenizer.json with llama.cpp's habits. Errors as of encoder_of."""

    def __init__(self, tokenizer: Mapping[str, Any]) -> None:
        self._rows = 1 + max([*_ids(tokenizer).values(), *(item["id"] for item in _added(tokenizer))], default=-1)
        self._encode = encoder_of(_as_llama_cpp_reads(tokenizer, self._rows))

    def ids(self, text: str, *, special: bool = True) -> list[int]:
        """special: BOS and EOS as the post-processor adds them."""
        return [index for index in self._encode(text, special) if index < self._rows]


def _as_llama_cpp_reads(tokenizer: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """tokenizer.json without NFC and tokens with NUL, with llama.cpp's nearest pre-tokenizer and its control tokens.

    Bytes without a token get one, numbered from `rows` on.
    """
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    model, ids = tokenizer["model"], _ids(tokenizer)
    if isinstance(model["vocab"], Mapping):
        vocab = {text if "\0" not in text else f"[EMPTY_{index}]": index for text, index in model["vocab"].items()}
        vocab |= {character: rows + number for number, character in enumerate(_without_token(tokenizer))}
        model = {**model, "vocab": vocab, "merges": [rule for rule in model["merges"] if "\0" not in "".join(rule)]}
    taken = [{"id": ids[text], "content": text, **plain, "special": True} for text in taken_for_control(tokenizer)]
    added = sorted([*_added(tokenizer), *taken], key=lambda item: int(item["id"]))
    normalizer = None if _is_nfc(tokenizer) else tokenizer["normalizer"]
    near = nearest_name(tokenizer)
    words = tokenizer.get("pre_tokenizer") if near is None else byte_level_json(NAMED[near].splits)
    return {**tokenizer, "added_tokens": added, "normalizer": normalizer, "pre_tokenizer": words, "model": model}


def taken_for_control(tokenizer: Mapping[str, Any]) -> list[str]:
    """Texts of ordinary tokens that llama.cpp takes for control tokens."""
    added = {item["content"] for item in _added(tokenizer)}
    return sorted((ENDS | FILL_IN) & (_ids(tokenizer).keys() - added))


def shows_the_difference(tokenizer: Mapping[str, Any], text: str) -> str | None:
    """Why llama.cpp may read this text differently, None when it must not."""
    if _is_nfc(tokenizer) and not unicodedata.is_normalized("NFC", text):
        return "llama.cpp does not normalize to NFC"
    if "\0" in text and any("\0" in token for token in _ids(tokenizer)):
        return "llama.cpp reads tokens as C strings, which hold no NUL"
    lost = {byte_alphabet().index(character) for character in _without_token(tokenizer)}
    if lost and not lost.isdisjoint(text.encode("utf-8", "surrogatepass")):
        return "llama.cpp drops a byte without a token after the merges"
    spelled = next((token for token in taken_for_control(tokenizer) if token in text), None)
    return spelled and f"llama.cpp takes {spelled!r} for a control token"


def _without_token(tokenizer: Mapping[str, Any]) -> list[str]:
    """Stand-ins of the bytes that a byte-level vocabulary lacks; none where bytes are spelled <0x0A>, or unknown."""
    model = tokenizer["model"]
    if not isinstance(model["vocab"], Mapping) or model.get("byte_fallback") or model.get("unk_token") is not None:
        return []
    return [character for character in byte_alphabet() if character not in model["vocab"]]


def _added(tokenizer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(tokenizer.get("added_tokens") or [])


def _ids(tokenizer: Mapping[str, Any]) -> Mapping[str, int]:
    """Token → id of the model; a unigram model lists its tokens with their scores."""
    vocab = tokenizer["model"]["vocab"]
    return vocab if isinstance(vocab, Mapping) else {text: index for index, (text, _) in enumerate(vocab)}


def _is_nfc(tokenizer: Mapping[str, Any]) -> bool:
    return '"NFC"' in json.dumps(tokenizer.get("normalizer"))
