"""llama.cpp's own vocabularies and the ids that it expects of them; its list of pre-tokenizer names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from qalora_export.errors import InputError
from qalora_export.formats.gguf.file import GgufFile
from qalora_export.formats.gguf.tokenizer.from_gguf import RAW_BPE, tokenizer_files_from_gguf
from qalora_export.formats.gguf.tokenizer.pretokenizer import NAMED, NOT_NAMED
from qalora_export.models.loading import load_tokenizer
from tests.formats.gguf.llama_vocab import llama_ids
from tests.formats.gguf.tokenizer.corpus import CORPUS
from tests.real.packages import member

SOURCE = "llama_cpp_python-0.3.36/vendor/llama.cpp"
READ = (
    "command-r",
    "deepseek-coder",
    "deepseek-llm",
    "falcon",
    "gemma-4",
    "gpt-2",
    "llama-bpe",
    "llama-spm",
    "mpt",
    "phi-3",
    "qwen2",
    "qwen35",
    "refact",
    "starcoder",
)


def vocabulary(name: str, suffix: str = "") -> Path:
    return member("llama-cpp-python", f"{SOURCE}/models/ggml-vocab-{name}.gguf{suffix}")


def metadata(name: str) -> dict[str, Any]:
    return dict(GgufFile(vocabulary(name)).metadata)


@pytest.mark.parametrize("name", READ)
def test_the_ids_are_those_that_llama_cpp_expects(name: str, tmp_path: Path) -> None:
    for file, content in tokenizer_files_from_gguf(metadata(name)).items():
        (tmp_path / file).write_bytes(content)
    tokenizer = load_tokenizer(tmp_path)
    with vocabulary(name, ".inp").open(encoding="utf-8", newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")
    wanted = [[int(word) for word in line.split()] for line in vocabulary(name, ".out").read_text().splitlines()]
    assert texts[len(wanted) :] in ([], [""])  # a separator ends most of the files
    texts = texts[: len(wanted)]
    found = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert len(texts) > 40
    differing = {text: (want, got) for text, want, got in zip(texts, wanted, found, strict=True) if want != got}
    assert not differing


@pytest.mark.parametrize("name", ["aquila", "baichuan", "gpt-neox"])
def test_without_expected_ids_llama_cpp_is_asked(name: str, tmp_path: Path) -> None:
    for file, content in tokenizer_files_from_gguf(metadata(name)).items():
        (tmp_path / file).write_bytes(content)
    tokenizer = load_tokenizer(tmp_path)
    texts = [text for text in CORPUS if "\0" not in text]
    found = [tokenizer(text)["input_ids"] for text in texts]
    wanted = llama_ids(vocabulary(name), texts)
    assert not {text: pair for text, *pair in zip(texts, wanted, found, strict=True) if pair[0] != pair[1]}


@pytest.mark.parametrize("name", ["bert-bge"])
def test_other_kinds_are_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match="'bert'"):
        tokenizer_files_from_gguf(metadata(name))


def test_every_pre_tokenizer_that_llama_cpp_knows_is_known_here() -> None:
    source = member("llama-cpp-python", f"{SOURCE}/src/llama-vocab.cpp").read_text(encoding="utf-8")
    names = set(re.findall(r'tokenizer_pre == "([^"]+)"', source))
    assert len(names) > 80
    assert names - {*NAMED, *RAW_BPE, *NOT_NAMED} == set()
    assert not set(NAMED) & {*RAW_BPE, *NOT_NAMED}
