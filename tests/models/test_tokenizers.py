"""Regular expressions of a tokenizer.json: the ids of Transformers, and an end to what does not end by itself."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from qalora_export.data.samples import load_samples
from qalora_export.errors import InputError, QaloraError, UnsafeInputError
from qalora_export.formats.gguf.tokenizer.pretokenizer import NAMED, byte_level_json
from qalora_export.formats.gguf.tokenizer.reading import LlamaCppReading
from qalora_export.models.loading import load_tokenizer
from qalora_export.models.tokenizers import Bounds

TEXTS = ("", "Turn on the lights, please!  é東\n\n 12345 it's", "a" * 300, " \t\r\n" * 40, "x" * 200_000)
ALPHABET = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def split(regex: str) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [step, ALPHABET]}}


def replace(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def changed(source: Path, folder: Path, **parts: Any) -> Path:
    shutil.copytree(source, folder)
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(raw | parts), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "gpt-4o", "deepseek-llm"])
def test_confined_ids_are_those_of_transformers(name: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = changed(tiny_model, tmp_path / "m", pre_tokenizer=byte_level_json(NAMED[name].splits))
    ours, plain = load_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    assert type(ours) is not type(plain)
    for text in TEXTS:
        for options in ({}, {"add_special_tokens": False}):
            assert list(ours(text, **options).input_ids) == list(plain(text, **options).input_ids)
        ids = plain(text).input_ids
        assert ours.decode(ids) == plain.decode(ids)
    assert ours(list(TEXTS[:2]))["input_ids"] == plain(list(TEXTS[:2]))["input_ids"]
    chat = [{"role": "user", "content": "on"}]
    assert ours.apply_chat_template(chat, return_dict=True) == dict(plain.apply_chat_template(chat, return_dict=True))


def test_tokens_that_are_added_later_are_seen(tiny_model: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(changed(tiny_model, tmp_path / "m", **split(r"\s+")))
    before = ours("<new>", add_special_tokens=False).input_ids
    ours.add_tokens(["<new>"])
    assert len(before) > 1 and len(ours("<new>", add_special_tokens=False).input_ids) == 1


ENDLESS = {
    "every place anew": (split(r"\s+$"), " " * 60_000 + "a"),
    "nested": (split(r"(a+)+$"), "a" * 200_000 + "b"),
    "normalizer": ({"normalizer": replace("x", Regex=r"\s+$")}, " " * 60_000 + "a"),
    "a long replacement": ({"normalizer": replace("x" * 10**6, String="q")}, "q" * 10_000),
    "growing": (
        {"normalizer": {"type": "Sequence", "normalizers": [replace("q" * 30, String="q")] * 12}},
        "q" * 100,
    ),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_text_that_would_take_for_ever_is_refused(
    name: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qalora_export.safety.confined.SECONDS", 0.3)
    monkeypatch.setattr("qalora_export.safety.confined.PER_SECOND", 10**6)
    parts, text = ENDLESS[name]
    folder, began = changed(tiny_model, tmp_path / "m", **parts), time.process_time()
    tokenizer = load_tokenizer(folder)
    with pytest.raises(QaloraError, match="tokenizer cannot encode") as caught:
        tokenizer(text)
    assert str(folder) in caught.value.where
    assert time.process_time() - began < 5
    assert tokenizer("b").input_ids  # and goes on with the next


def test_a_stage_names_the_tokenizer(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qalora_export.safety.confined.SECONDS", 0.3)
    folder = changed(tiny_model, tmp_path / "m", **split(r"\s+$"))
    (tmp_path / "text.txt").write_text("a" + " " * 60_000 + "b")
    with pytest.raises(UnsafeInputError, match="bounded time"):
        load_samples(tmp_path / "text.txt", load_tokenizer(folder), sequence_length=64)


def test_a_file_that_does_not_load_in_time_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens of its own are normalized while it is loaded, by its own expressions."""
    monkeypatch.setattr("qalora_export.models.tokenizers.SECONDS", 0.3)
    token = {"id": 9999, "content": "a" + " " * 60_000 + "b", "normalized": True, "special": False}
    added = [token | {"single_word": False, "lstrip": False, "rstrip": False}]
    folder = changed(tiny_model, tmp_path / "m", normalizer=replace("x", Regex=r"\s+$"), added_tokens=added)
    with pytest.raises(UnsafeInputError, match="cannot load"):
        load_tokenizer(folder)


def test_an_expression_that_is_none_is_bad_input(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tokenizer cannot load"):
        load_tokenizer(changed(tiny_model, tmp_path / "m", **split("(")))


def test_what_needs_bounds() -> None:
    space = replace("▁", String=" ")
    plain = {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]}}
    assert Bounds.of(plain | {"pre_tokenizer": ALPHABET, "decoder": space}) == Bounds(False, False)
    assert Bounds.of(split(r"\s+")) == Bounds(True, False)
    assert Bounds.of({"decoder": replace("", Regex="a")}) == Bounds(False, True)
    assert Bounds.of({"normalizer": {"type": "Precompiled"}}).encode
    assert Bounds.of({"normalizer": {"type": "Sequence", "normalizers": [[]]}}).encode
    assert Bounds.of({"normalizer": replace("x", String="")}).encode
    assert Bounds.of([]) == Bounds(False, False)


def test_every_step_of_the_library_is_known_or_confined() -> None:
    """A new kind of step is confined until somebody has looked at it."""
    raw = json.loads(Tokenizer.from_str('{"model": {"type": "BPE", "vocab": {}, "merges": []}}').to_str())
    assert Bounds.of(raw) == Bounds(False, False)
    assert Bounds.of(raw | {"pre_tokenizer": {"type": "FixedLength", "length": 5}}).encode


def test_a_token_that_would_lie_beyond_the_embedding_is_refused_with_the_remedy(
    tiny_model: Path, tmp_path: Path
) -> None:
    """As InternLM2's: the config calls ids <|im_start|> that tokenizer.json calls otherwise."""
    folder = changed(tiny_model, tmp_path / "m")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    rows = len(load_tokenizer(folder))
    meant = {"content": "<|start|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    *merges, last = raw["model"]["merges"]
    other = "".join(last.split(" ") if isinstance(last, str) else last)
    index = raw["model"]["vocab"][other]
    own = {str(index): {**meant, "single_word": False}}
    settings["added_tokens_decoder"] = settings.get("added_tokens_decoder", {}) | own
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert PreTrainedTokenizerFast.from_pretrained(folder).convert_tokens_to_ids("<|start|>") == rows
    with pytest.raises(InputError, match=rf"gets id {rows}, .*says {index} .*rename .* in tokenizer.json"):
        load_tokenizer(folder)
    del raw["model"]["vocab"][other]
    raw["model"]["vocab"]["<|start|>"], raw["model"]["merges"] = index, merges
    raw["added_tokens"].append({"id": index, **meant, "single_word": False})
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    assert load_tokenizer(folder)("<|start|>", add_special_tokens=False).input_ids == [index]


@pytest.mark.parametrize("name", ENDLESS)
def test_llama_cpps_reading_of_such_a_tokenizer_ends_too(
    name: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, text = ENDLESS[name]
    raw = json.loads((changed(tiny_model, tmp_path / "m", **parts) / "tokenizer.json").read_text(encoding="utf-8"))
    monkeypatch.setattr("qalora_export.models.tokenizers.SECONDS", 0.3)
    monkeypatch.setattr("qalora_export.safety.confined.PER_SECOND", 10**6)
    reader = LlamaCppReading(raw)
    began = time.monotonic()
    with pytest.raises(QaloraError, match="cannot encode a text"):
        reader.ids(text)
    assert time.monotonic() - began < 20
    assert reader.ids("a") == load_tokenizer(tiny_model)("a").input_ids
