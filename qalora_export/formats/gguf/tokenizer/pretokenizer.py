"""Which of llama.cpp's pre-tokenizers is the one in tokenizer.json: a table keyed on the JSON itself.

llama.cpp knows splitting expressions by name (`tokenizer.ggml.pre`, src/llama-vocab.cpp) and ties `ignore_merges` to
the name. A tokenizer is exported only when both agree; guessing here is how "right weights, wrong output" begins.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qalora_export.errors import InputError

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(digits: str) -> tuple[Any, ...]:
    return (("Split", f"{CONTRACTIONS}|{WORDS}|{digits}|{REST}"), ("ByteLevel", False))


# (steps of the pre-tokenizer, ignore_merges) -> name in llama.cpp
KNOWN: dict[tuple[tuple[Any, ...], bool], str] = {
    (_split(r"\p{N}{1,3}"), True): "llama-bpe",  # Llama 3
    (_split(r"\p{N}{1,3}"), False): "smaug-bpe",  # the same expression, merges always applied
    (_split(r"\p{N}"), False): "qwen2",
    ((("ByteLevel", True),), False): "gpt-2",
    ((("Digits", True), ("ByteLevel", True)), False): "smollm",
}


def identify(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a parsed tokenizer.json. Raises InputError, with what was found."""
    raw = tokenizer.get("pre_tokenizer")
    ignore_merges = bool(tokenizer["model"].get("ignore_merges", False))
    name = KNOWN.get((_steps(raw), ignore_merges))
    if name is None:
        raise InputError(
            "llama.cpp has no pre-tokenizer that we know to equal this one",
            where="tokenizer.json: pre_tokenizer",
            why=f"found {json.dumps(raw, ensure_ascii=False)[:400]} with ignore_merges = {ignore_merges}; "
            f"known: {', '.join(sorted(KNOWN.values()))}",
            fix="add the expression to formats/gguf/pretokenizer.py together with a test against llama.cpp",
        )
    return name


def _steps(raw: Any) -> tuple[Any, ...]:
    """The pre-tokenizer as a tuple of (type, what matters); an unknown step stands for itself and matches nothing."""
    if not isinstance(raw, Mapping):
        return ()
    if raw.get("type") == "Sequence":
        return tuple(step for part in raw.get("pretokenizers", []) for step in _steps(part))
    match raw:
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated"} if not raw.get("invert"):
            return (("Split", regex),)
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return (("ByteLevel", bool(raw.get("use_regex", True))),)
        case {"type": "Digits"}:
            return (("Digits", bool(raw.get("individual_digits"))),)
    return (("unknown", json.dumps(raw, sort_keys=True)),)
