"""SentencePiece's BPE from tokenizer.json: words begin with ▁, unknown characters fall back to bytes; type "llama".

llama.cpp has no merge rules there: it joins the two neighbours whose joint text is the token with the best score. So a
token's score is −(rank of the first rule that makes it), and that is the same order only when every way of joining two
tokens into a third is a rule and all ways to one token stand together, as in every tokenizer.json that was converted
from a SentencePiece model (runs of one character excepted, which Gemma ranks among each other). Where two ways to one
token overlap in a text ("aaa" as a|aa and aa|a) llama.cpp takes the leftmost and BPE the higher rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from qalora_export.errors import InputError
from qalora_export.formats.gguf.metadata import Entry
from qalora_export.formats.gguf.tokenizer.token_types import BYTE, BYTE_TOKEN, NORMAL
from qalora_export.formats.gguf.tokenizer.vocabulary import Vocabulary, merge_rules, numbered, padded, token_types

SPACE = "▁"
PREPEND = {"type": "Prepend", "prepend": SPACE}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
NO_SPLIT = (None, {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False})
NEVER_JOINED = -1e6  # below every rank: a token that no rule makes


def sentencepiece_vocabulary(raw: Mapping[str, Any], rows: int) -> Vocabulary:
    """Tokens, types and scores of a parsed tokenizer.json; `rows`: rows of the embedding matrix.

    Raises InputError, with the reason, where llama.cpp would tokenize another way.
    """
    model, added = raw["model"], raw.get("added_tokens") or []
    vocab = model["vocab"]
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(option):
            raise InputError(
                f"BPE option {option} = {model[option]!r} is not supported",
                where="tokenizer.json: model",
                why="llama.cpp has no such option for a tokenizer with byte_fallback",
            )
    prefix = _space_prefix(raw, vocab)
    tokens = numbered(vocab, added, rows)
    types = token_types(tokens, added, rows, model.get("unk_token"))
    for index, text in tokens.items():
        if BYTE_TOKEN.fullmatch(text) and types[index] == NORMAL:
            types[index] = BYTE
    matched = {item["content"] for item in added}  # found in the text before anything is joined
    ranks = _token_ranks(merge_rules(model.get("merges"), vocab), vocab.keys() - matched)
    scores = [-float(ranks[text]) if text in ranks else NEVER_JOINED for text in padded(tokens, rows)]
    return Vocabulary(
        "llama",
        "default",
        padded(tokens, rows),
        types,
        [
            Entry("tokenizer.ggml.scores", "array", scores),
            Entry("tokenizer.ggml.add_space_prefix", "bool", prefix),
            Entry("tokenizer.ggml.remove_extra_whitespaces", "bool", False),
        ],
    )


def _space_prefix(raw: Mapping[str, Any], vocab: Mapping[str, int]) -> bool:
    """Whether ▁ is put before every stretch of text. Raises InputError for any other treatment of spaces."""
    normalizer, pre = raw.get("normalizer"), raw.get("pre_tokenizer")
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    if steps in ([PREPEND, REPLACE], [REPLACE]) and pre in NO_SPLIT:
        return PREPEND in steps
    if steps in ([None], []) and pre is not None and pre.get("type") == "Metaspace" and pre["replacement"] == SPACE:
        if pre.get("split", True) and (odd := next((text for text in vocab if SPACE in text[1:]), None)):
            raise InputError(
                "words are parted at every space, and llama.cpp does not part them",
                where="tokenizer.json: pre_tokenizer",
                why=f"token {odd!r} would come out there and never here",
            )
        if pre.get("prepend_scheme", "always") == "never":
            return False
        raise InputError(
            f"a space is put before a text by the rule {pre.get('prepend_scheme', 'always')!r}",
            where="tokenizer.json: pre_tokenizer",
            why="llama.cpp puts one before every stretch of text, behind special tokens and before a space as well: "
            "the text ' a' would get another id",
            fix='with "prepend_scheme": "never" chat prompts that begin with a special token keep their ids',
        )
    raise InputError(
        "llama.cpp does not treat spaces in this way",
        where="tokenizer.json: normalizer and pre_tokenizer",
        why=f"found {str(normalizer)[:200]} and {str(pre)[:200]}",
    )


def _token_ranks(rules: list[tuple[str, str]], joined: Set[str]) -> dict[str, int]:
    """Token → rank of its first rule. Raises InputError unless that order is the order of all rules."""
    ranks: dict[str, int] = {}
    last = None
    for rank, (left, right) in enumerate(rules):
        text = left + right
        if text in ranks and text != last and len(set(text)) > 1:
            raise _other_order(f"the rules that make {text!r} do not stand together")
        ranks.setdefault(text, rank)
        last = text
    missing = _missing_rule(set(rules), joined)
    if missing is not None:
        raise _other_order(
            f"no rule joins {missing[0]!r} and {missing[1]!r}, which are tokens like {''.join(missing)!r}"
        )
    return ranks


def _missing_rule(rules: set[tuple[str, str]], joined: Set[str]) -> tuple[str, str] | None:
    for text in joined:
        for cut in range(1, len(text)):
            pair = (text[:cut], text[cut:])
            if pair not in rules and pair[0] in joined and pair[1] in joined:
                return pair
    return None


def _other_order(found: str) -> InputError:
    return InputError(
        "llama.cpp would join tokens in another order",
        where="tokenizer.json: model.merges",
        why=f"{found}; it knows scores of tokens, not rules",
    )
