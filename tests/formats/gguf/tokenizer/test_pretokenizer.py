"""Every pre-tokenizer name, asked of llama.cpp: a tokenizer with the name's expressions gets the same ids there."""

from __future__ import annotations

from typing import Any

import pytest

from qalora_export.formats.gguf.tokenizer.pretokenizer import NAMED
from tests.formats.gguf.llama_vocab import llama_ids_of_all
from tests.formats.gguf.tokenizer.corpus import CORPUS
from tests.formats.gguf.tokenizer.synthetic import byte_level, hugging_face_ids, write_vocabulary


def fields(raw: dict[str, Any], pre: str) -> dict[str, Any]:
    vocab = raw["model"]["vocab"] | {token["content"]: token["id"] for token in raw["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    special = {token["id"] for token in raw["added_tokens"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if index in special else 1 for index in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in raw["model"]["merges"]],
        "tokenizer.ggml.add_bos_token": False,
    }


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[list[int]], list[list[int]]]]:
    """Name → (ids of Hugging Face, ids of llama.cpp) on the corpus."""
    folder = tmp_path_factory.mktemp("names")
    trained = {
        key: byte_level(key[0], ignore_merges=key[1]) for key in {(p.splits, p.ignore_merges) for p in NAMED.values()}
    }
    raws = {name: trained[known.splits, known.ignore_merges] for name, known in NAMED.items()}
    expected = {key: hugging_face_ids(raw, CORPUS) for key, raw in trained.items()}
    files = [write_vocabulary(folder / f"{name}.gguf", fields(raw, name)) for name, raw in raws.items()]
    found = llama_ids_of_all(files, CORPUS)
    return {
        name: (expected[NAMED[name].splits, NAMED[name].ignore_merges], ids)
        for name, ids in zip(raws, found, strict=True)
    }


@pytest.mark.parametrize("name", NAMED)
def test_a_name_means_its_expressions(name: str, answers: dict[str, Any]) -> None:
    expected, found = answers[name]
    differing = {text: (want, got) for text, want, got in zip(CORPUS, expected, found, strict=True) if want != got}
    assert not differing
