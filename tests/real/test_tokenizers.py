"""Fifteen real tokenizers: in GGUF llama.cpp gives their ids, or the export is refused because it could not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from qalora_export.errors import InputError
from qalora_export.formats.gguf.tokenizer.fields import name_for_llama_cpp, tokenizer_entries
from qalora_export.formats.gguf.tokenizer.reading import as_llama_cpp_reads, shows_the_difference
from qalora_export.models.loading import load_tokenizer
from tests.formats.gguf.llama_vocab import llama_ids
from tests.formats.gguf.tokenizer.synthetic import write_vocabulary
from tests.real.tokenizers import corpus, rows_of, tokenizer_folder, with_declared_names


@dataclass(frozen=True)
class Case:
    """refused: what the refusal says; None: exported. prepare: what the user has to do to the files first."""

    name: str
    model: str = ""
    pre: str = ""
    refused: str | None = None
    prepare: Callable[[Path], Path] = lambda folder: folder


CASES = [
    Case("llama2", "llama", "default"),
    Case("llama3", "gpt2", "llama-bpe"),
    Case("llama3_2", "gpt2", "llama-bpe"),
    Case("qwen1_5", "gpt2", "qwen2"),
    Case("qwen2_5", "gpt2", "qwen2"),
    Case("qwen3", "gpt2", "qwen2"),
    Case("gemma", "llama", "default"),
    Case("gemma2", "llama", "default"),
    Case("gemma3", "llama", "default"),
    Case("yi", "llama", "default"),
    Case("internlm2", "llama", "default", prepare=with_declared_names),
    Case("deepseek_v3", "gpt2", "deepseek-v3"),
    Case("gpt4o", refused="cuts words in another way"),
    Case("mistral_nemo", refused="cuts words in another way"),
    Case("command_r_plus", refused="post-processor puts tokens"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_llama_cpp_gives_the_ids_of_hugging_face(case: Case, tmp_path: Path) -> None:
    folder = case.prepare(tokenizer_folder(case.name, tmp_path / "hf"))
    rows = rows_of(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
    if case.refused:
        with pytest.raises(InputError, match=case.refused):
            tokenizer_entries(folder, {"vocab_size": rows})
        return
    entries = tokenizer_entries(folder, {"vocab_size": rows})
    fields = {entry.key: entry.value for entry in entries}
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == (case.model, case.pre)
    model = write_vocabulary(tmp_path / "v.gguf", entries, name=name_for_llama_cpp(case.name, folder))

    tokenizer, texts = load_tokenizer(folder), corpus(folder)
    assert len(texts) > 1500
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    wanted = [tokenizer(text)["input_ids"] for text in texts]
    differing = {
        text: (want, got) for text, want, got in zip(texts, wanted, llama_ids(model, texts), strict=True) if want != got
    }
    # What is left is a difference by design, and exactly that one.
    reader = Tokenizer.from_str(json.dumps(as_llama_cpp_reads(raw)))
    unexplained = {
        text: pair
        for text, pair in differing.items()
        if not shows_the_difference(raw, text) or reader.encode(text).ids != pair[1]
    }
    assert not unexplained, list(unexplained.items())[:3]


def test_two_names_for_one_id_are_refused_with_the_remedy(tmp_path: Path) -> None:
    folder = tokenizer_folder("internlm2", tmp_path)
    with pytest.raises(InputError, match=r"92538 belongs to .*141\]' and '<\|plugin\|>'.*rename the first"):
        tokenizer_entries(folder, {"vocab_size": 92544})
