"""The order of tokens is a fact of every kind of tokenizer: right files have it, and a changed score or rule shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qalora_export.formats.gguf.tokenizer.fields import tokenizer_entries
from qalora_export.formats.gguf.tokenizer.pretokenizer import NAMED
from qalora_export.verify.runtimes.facts import differing_facts, expected_text_facts
from qalora_export.verify.runtimes.llama_cpp import facts_of
from tests.formats.gguf.tokenizer.synthetic import byte_level, sentencepiece, unigram, with_bos

REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
WORDS = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "WhitespaceSplit"},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
    ],
}
ROWS = 1600
KINDS: dict[str, tuple[Callable[[], dict[str, Any]], str, str]] = {
    "bytes": (lambda: with_bos(byte_level(NAMED["qwen2"].splits), "<s>"), "merges", "merges"),
    "SentencePiece": (lambda: with_bos(sentencepiece(normalizer=REPLACE), "<s>"), "scores", "tokens by rank"),
    "unigram": (lambda: unigram() | {"pre_tokenizer": WORDS}, "scores", "scores"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_tokens_is_compared(kind: str, tmp_path: Path) -> None:
    make, key, fact = KINDS[kind]
    (tmp_path / "tokenizer.json").write_text(json.dumps(make()))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    )
    metadata = {entry.key: entry.value for entry in tokenizer_entries(tmp_path, {"vocab_size": ROWS})}
    expected = expected_text_facts(tmp_path)
    assert expected[fact]
    assert differing_facts(expected, _found(metadata, tmp_path)) == []

    changed = list(metadata[f"tokenizer.ggml.{key}"])
    at = next(at for at in range(300, len(changed)) if changed[at] != changed[at + 1])
    changed[at : at + 2] = changed[at + 1], changed[at]
    found = _found(metadata | {f"tokenizer.ggml.{key}": changed}, tmp_path)
    assert [line.split(":")[0] for line in differing_facts(expected, found)] == [fact]


def test_another_kind_of_tokenizer_in_the_file_is_a_difference(tmp_path: Path) -> None:
    assert differing_facts({"merges": ["a b"]}, _found({"tokenizer.ggml.model": "llama"}, tmp_path))


def _found(metadata: dict[str, Any], folder: Path) -> dict[str, Any]:
    arch = {"general.architecture": "llama"}
    return facts_of(folder / "none.gguf", arch | metadata)
