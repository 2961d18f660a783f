"""llama.cpp's token types, and the texts it takes for control tokens whatever type the file gives them.

Source: llama.h (enum llama_token_type), llama-vocab.cpp (impl::load, "auto-detect special tokens by text").
"""

from __future__ import annotations

import re
from collections.abc import Sequence

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

PADDING = re.compile(r"\[PAD\d+\]")  # fills ids that no token has, up to the rows of the embedding
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's stand-in of one byte

# End a generation when they occur in the vocabulary.
ENDS = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",
        "[e~[",
    ]
)
# Mark the parts of a fill-in-the-middle prompt.
FILL_IN = frozenset(
    [
        "<|fim_prefix|>",
        "<fim-prefix>",
        "<fim_prefix>",
        "<｜fim▁begin｜>",
        "<PRE>",
        "▁<PRE>",
        "<|code_prefix|>",
        "<|prefix|>",
        "<|fim_suffix|>",
        "<fim-suffix>",
        "<fim_suffix>",
        "<｜fim▁hole｜>",
        "<SUF>",
        "▁<SUF>",
        "<|code_suffix|>",
        "<|suffix|>",
        "<|fim_middle|>",
        "<fim-middle>",
        "<fim_middle>",
        "<｜fim▁end｜>",
        "<MID>",
        "▁<MID>",
        "<|code_middle|>",
        "<|middle|>",
        "<|fim_pad|>",
        "<fim-pad>",
        "<fim_pad>",
        "<PAD>",
        "[PAD]",
        "<|fim_repo|>",
        "<fim-repo>",
        "<|repo_name|>",
        "<REPO>",
        "<reponame>",
        "<|file_sep|>",
    ]
)
# Of these, the padding, repository and file marks end a generation, the first of each that is found.
FILL_IN_ENDS = frozenset(
    [
        *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
        *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
        "<|file_sep|>",
    ]
)
# The special tokens of Phi-3 behind which white space counts.
KEEPS_SPACE = frozenset(("<unk>", "<s>", "<|endoftext|>"))
# Always shown, never control.
SHOWN = frozenset(("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"))


def effective_types(tokens: Sequence[str], declared: Sequence[int]) -> list[int]:
    """The types llama.cpp works with for tokens that the file declares as `declared`."""
    present = set(tokens) & (ENDS | FILL_IN | SHOWN)
    special = dict.fromkeys(present & (ENDS | FILL_IN), CONTROL) | dict.fromkeys(present & SHOWN, USER_DEFINED)
    if present >= {"<|return|>", "<|call|>", "<|end|>"} or present >= {"<|flush|>", "<|calls|>", "<|end|>"}:
        special["<|end|>"] = USER_DEFINED  # ends a message there, not the generation
    if "<|tool_response>" in present or "<|plamo:eos|>" in tokens:
        special["</s>"] = NORMAL  # a tag of HTML there
    return [special.get(text, kind) for text, kind in zip(tokens, declared, strict=True)]


def effective_ends(tokens: Sequence[str]) -> set[str]:
    """Texts of the vocabulary at which llama.cpp ends generation though no key of the file says so.

    fim_pad, fim_rep and fim_sep, which it finds by their texts where the file does not name them, end it too.
    """
    present = set(tokens)
    kinds = dict(zip(tokens, effective_types(tokens, [CONTROL] * len(tokens)), strict=True))
    return {text for text in present & (ENDS | FILL_IN_ENDS) if kinds[text] == CONTROL}


def strips_right(model_name: str, text: str) -> bool:
    """Whether llama.cpp drops white space behind this special token: it goes by the model's name."""
    return any(name in model_name.lower() for name in ("phi-3", "phi3")) and text not in KEEPS_SPACE
