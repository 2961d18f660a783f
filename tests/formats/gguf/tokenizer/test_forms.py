"""Every form of tokenizer, exported and asked of llama.cpp: the ids are Hugging Face's, or the export is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from qalora_export.errors import InputError
from qalora_export.formats.gguf.tokenizer.alphabet import byte_alphabet
from qalora_export.formats.gguf.tokenizer.fields import tokenizer_entries, vocabulary
from qalora_export.formats.gguf.tokenizer.from_gguf import tokenizer_files_from_gguf
from qalora_export.formats.gguf.tokenizer.pretokenizer import NAMED, O200K, TEKKEN
from qalora_export.formats.gguf.tokenizer.reading import LlamaCppReading, shows_the_difference
from tests.formats.gguf.llama_vocab import llama_ids
from tests.formats.gguf.tokenizer.corpus import CORPUS, DECOMPOSED
from tests.formats.gguf.tokenizer.synthetic import (
    byte_level,
    hugging_face_ids,
    sentencepiece,
    unigram,
    with_bos,
    with_tokens,
    write_vocabulary,
)

Raw = dict[str, Any]
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREFIXED = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, REPLACE]}
LOST = byte_alphabet()[0x7F]
DROPPED = ("=\x7f=", "a !\x7f! b")  # llama.cpp drops the byte after the merges, Hugging Face before them
QWEN = NAMED["qwen2"].splits


def metaspace(scheme: str, *, split: bool = False) -> Raw:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}


def without_bytes(raw: Raw) -> Raw:
    """The last bytes of the alphabet, those no UTF-8 contains, and \x7f lose their tokens."""
    lost = {chr(byte) for byte in (0xC0, 0xC1, *range(0xF1, 0x100))} | {LOST}
    vocab = {text: index for text, index in raw["model"]["vocab"].items() if not lost & set(text)}
    merges = [pair for pair in raw["model"]["merges"] if "".join(pair) in vocab]
    vocab |= {token["content"]: token["id"] for token in raw["added_tokens"]}  # with holes, ids come from here alone
    return {**raw, "model": {**raw["model"], "vocab": vocab, "merges": merges}}


FORMS: dict[str, tuple[Callable[[], Raw], str]] = {
    "bytes": (lambda: with_bos(byte_level(QWEN), "<s>"), "gpt2"),
    "bytes, NFC": (lambda: byte_level(QWEN) | {"normalizer": {"type": "NFC"}}, "gpt2"),
    "bytes, some without a token": (lambda: without_bytes(byte_level(QWEN)), "gpt2"),
    "bytes, tokens that are no control tokens": (
        lambda: with_tokens(byte_level(QWEN), ["<think>", "    "], special=False),
        "gpt2",
    ),
    "SentencePiece, ▁ before each stretch": (lambda: with_bos(sentencepiece(normalizer=PREFIXED), "<s>"), "llama"),
    "SentencePiece, no ▁ before": (lambda: sentencepiece(normalizer=REPLACE), "llama"),
    "SentencePiece, Metaspace never": (lambda: sentencepiece(pre_tokenizer=metaspace("never")), "llama"),
    "SentencePiece, split at spaces that are gone": (
        lambda: sentencepiece(
            normalizer=REPLACE,
            pre_tokenizer={
                "type": "Split",
                "pattern": {"String": " "},
                "behavior": "MergedWithPrevious",
                "invert": False,
            },
        ),
        "llama",
    ),
}


def folder_of(raw: Raw, folder: Path) -> Path:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


def exported(raw: Raw, folder: Path) -> tuple[dict[str, Any], Path]:
    rows = Tokenizer.from_str(json.dumps(raw)).get_vocab_size() + 300
    found = tokenizer_entries(folder_of(raw, folder / "hf"), {"vocab_size": rows})
    return {entry.key: entry.value for entry in found}, write_vocabulary(folder / "vocab.gguf", found)


@pytest.mark.parametrize("form", FORMS)
def test_llama_cpp_gives_the_ids_of_hugging_face(form: str, tmp_path: Path) -> None:
    raw, kind = FORMS[form][0](), FORMS[form][1]
    fields, model = exported(raw, tmp_path)
    assert fields["tokenizer.ggml.model"] == kind
    texts = (*CORPUS, *DROPPED)
    expected, found = hugging_face_ids(raw, texts), llama_ids(model, texts)
    differing = {text: (want, got) for text, want, got in zip(texts, expected, found, strict=True) if want != got}
    reader = LlamaCppReading(raw)
    for text, (_, got) in differing.items():  # what is left is a difference by design, and exactly that
        assert shows_the_difference(raw, text)
        assert reader.ids(text) == got
    assert bool(set(DROPPED) & set(differing)) == ("without a token" in form)
    if "NFC" in form:
        assert set(DECOMPOSED) & set(differing)
    elif not raw["normalizer"] and kind == "gpt2":
        assert set(differing) <= set(DROPPED) | {text for text in CORPUS if "\x7f" in text}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_comes_back_as_a_tokenizer_with_the_same_ids(form: str, tmp_path: Path) -> None:
    raw = FORMS[form][0]()
    fields, _ = exported(raw, tmp_path)
    again = json.loads(tokenizer_files_from_gguf(fields)["tokenizer.json"])
    texts = [text for text in CORPUS if shows_the_difference(raw, text) is None]
    assert hugging_face_ids(again, texts) == hugging_face_ids(raw, texts)


def test_a_unigram_tokenizer_gets_the_ids_of_hugging_face(tmp_path: Path) -> None:
    raw = unigram()
    raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace("always")]}
    fields, model = exported(raw, tmp_path)
    assert fields["tokenizer.ggml.model"] == "t5"
    # Of several ways with one score each runtime chooses its own, so no text may repeat itself.
    texts = [text for text in CORPUS if text.isprintable() and text.isascii() and not re.search(r"(.+)\1\1", text)]
    texts = [text for text in texts if shows_the_difference(raw, text) is None]
    assert len(texts) > 20
    assert llama_ids(model, texts) == hugging_face_ids(raw, texts)


REFUSED: dict[str, tuple[Callable[[], Raw], str]] = {
    "a ▁ before the first stretch only": (lambda: sentencepiece(pre_tokenizer=metaspace("first")), "'first'"),
    "a ▁ unless one is there": (lambda: sentencepiece(pre_tokenizer=metaspace("always")), "' a'"),
    "o200k with words in capitals": (lambda: byte_level((O200K,)), "cuts words in another way"),
    "Tekken with vowel signs": (lambda: byte_level((TEKKEN,), ignore_merges=True), "cuts words in another way"),
    "unigram with bytes": (lambda: {**unigram(), "model": {**unigram()["model"], "byte_fallback": True}}, "unigram"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_llama_cpp_has_no_form_for_is_refused_with_the_reason(form: str, tmp_path: Path) -> None:
    make, said = REFUSED[form]
    with pytest.raises(InputError, match=said):
        exported(make(), tmp_path)


def test_rules_in_another_order_than_scores_can_say_are_refused(tmp_path: Path) -> None:
    raw = sentencepiece(normalizer=REPLACE)
    merges = raw["model"]["merges"]
    made = ["".join(pair) for pair in merges]
    twice = next(rank for rank, text in enumerate(made) if text == made[rank - 1] and len(set(text)) > 1)
    moved = merges.pop(twice)
    with pytest.raises(InputError, match="no rule joins"):
        vocabulary(raw, 4096)
    merges.append(moved)
    with pytest.raises(InputError, match="do not stand together"):
        vocabulary(raw, 4096)


def test_the_text_named_in_a_refusal_gets_other_ids_in_llama_cpp(tmp_path: Path) -> None:
    raw = byte_level((O200K,))
    with pytest.raises(InputError) as refusal:
        exported(raw, tmp_path)
    text = str(refusal.value).split("the text '")[1].split("'")[0]
    tokens = sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].__getitem__)
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-4o",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in raw["model"]["merges"]],
    }
    assert llama_ids(write_vocabulary(tmp_path / "v.gguf", fields), [text]) != hugging_face_ids(raw, [text])
