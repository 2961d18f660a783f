"""GGUF metadata → tokenizer files: Hugging Face's tokenizer on them gives llama.cpp's ids on the GGUF file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qalora_export.errors import InputError
from qalora_export.formats.gguf.tokenizer.from_gguf import tokenizer_files_from_gguf
from qalora_export.formats.gguf.tokenizer.pretokenizer import NAMED
from qalora_export.models.loading import load_tokenizer
from tests.formats.gguf.llama_vocab import llama_ids
from tests.formats.gguf.tokenizer.corpus import CORPUS
from tests.formats.gguf.tokenizer.synthetic import byte_level, sentencepiece, write_vocabulary

Fields = dict[str, Any]


def byte_level_fields(pre: str = "qwen2") -> Fields:
    raw = byte_level(NAMED[pre].splits, ignore_merges=NAMED[pre].ignore_merges)
    tokens = list(raw["model"]["vocab"]) + [token["content"] for token in raw["added_tokens"]]
    first = len(raw["model"]["vocab"])
    return {
        "general.name": "small",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, "[PAD1]", "[PAD2]"],
        "tokenizer.ggml.token_type": [1] * first + [3, 3, 4, 3] + [5, 5],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in raw["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": first,
        "tokenizer.ggml.eos_token_id": first + 1,
        "tokenizer.ggml.eot_token_id": first + 3,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages }}",
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "{{ tools }}",
    }


def sentencepiece_fields(own: str = "  ", **more: Any) -> Fields:
    vocab: dict[str, int] = sentencepiece()["model"]["vocab"]
    tokens = [*vocab, "<|user|>", "<|endoftext|>", own]
    types = [6 if token.startswith("<0x") else 1 for token in vocab]
    types[:3] = [2, 3, 3]
    return {
        "general.name": "small",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*types, 3, 3, 4],
        "tokenizer.ggml.scores": [-float(index) for index in range(len(tokens))],
        **more,
    }


CASES: dict[str, Callable[[], Fields]] = {
    "bytes, one expression": byte_level_fields,
    "bytes, whole words first": lambda: byte_level_fields("llama-bpe"),
    "bytes, several expressions": lambda: byte_level_fields("deepseek-llm"),
    "SentencePiece": sentencepiece_fields,
    "SentencePiece without a space before": lambda: sentencepiece_fields(**{"tokenizer.ggml.add_space_prefix": False}),
    "SentencePiece, BOS and EOS": lambda: sentencepiece_fields(**{"tokenizer.ggml.add_eos_token": True}),
    "Phi-3 by its name": lambda: sentencepiece_fields("<|tag|>", **{"general.name": "My Phi-3"}),
}


def folder_of(fields: Fields, folder: Path) -> Path:
    folder.mkdir()
    for name, content in tokenizer_files_from_gguf(fields).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_llama_cpp(case: str, tmp_path: Path) -> None:
    fields = CASES[case]()
    keys = {key: value for key, value in fields.items() if key != "general.name"}
    model = write_vocabulary(tmp_path / "vocab.gguf", keys, name=fields["general.name"])
    tokenizer = load_tokenizer(folder_of(fields, tmp_path / "hf"))
    texts = [text for text in CORPUS if text != "x" * 300]  # ties of equal scores: see the module
    expected = llama_ids(model, texts)
    assert {t: tokenizer(t)["input_ids"] for t in texts} == dict(zip(texts, expected, strict=True))


def test_special_tokens_templates_and_every_end(tmp_path: Path) -> None:
    fields = byte_level_fields()
    folder = folder_of(fields, tmp_path / "hf")
    tokenizer = load_tokenizer(folder)
    first = fields["tokenizer.ggml.bos_token_id"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", None)
    assert tokenizer.get_chat_template() == "{{ messages }}"
    assert tokenizer.get_chat_template(chat_template="tool_use") == "{{ tools }}"
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "bos_token_id": first,
        "eos_token_id": [first + 1, first + 3],
    }


def test_ids_without_a_token_stay_without_one(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_of(byte_level_fields(), tmp_path / "hf"))
    assert len(tokenizer) == len(byte_level_fields()["tokenizer.ggml.tokens"]) - 2


FAULTS: dict[str, tuple[Fields, str]] = {
    "a type we cannot write": ({"tokenizer.ggml.model": "bert"}, "bert"),
    "a pre-tokenizer we do not know": ({"tokenizer.ggml.pre": "kimi-k2"}, "kimi-k2"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "not an array of str"),
    "types of another length": ({"tokenizer.ggml.token_type": [1]}, "has 1 entries"),
    "the same text twice": ({"tokenizer.ggml.tokens": ["a"] * 902}, "same text"),
    "a merge that joins nothing": ({"tokenizer.ggml.merges": ["a bcdefg"]}, "merge rule 0"),
    "a template that is no text": ({"tokenizer.chat_template": 7}, "chat_template is a int"),
    "a switch that is no switch": ({"tokenizer.ggml.add_bos_token": 1}, "add_bos_token is a int"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_malformed_metadata_is_refused(fault: str) -> None:
    change, said = FAULTS[fault]
    with pytest.raises(InputError, match=said):
        tokenizer_files_from_gguf(byte_level_fields() | change)
