"""Tokens without a row in the embedding: left out where nothing needs them, and said; else left as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import qalora_export as q
from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.formats.gguf.tokenizer.fields import tokenizer_entries
from qalora_export.models.loading import load_tokenizer
from qalora_export.models.spare_tokens import WithoutSpareTokens, spare_tokens
from qalora_export.quantization.check import open_forecast
from qalora_export.safety import read_json
from qalora_export.verify.reference.ancestry import ancestry
from qalora_export.verify.reference.merge_check import MergeCheck

SPARE = "<image_soft_token>"
RTN = q.QuantizeSettings(method="rtn")


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A tokenizer with one token more than the embedding has rows, named in every way of Gemma 3's files."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    rows = read_json(folder / "config.json")["vocab_size"]
    item = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"content": SPARE, "special": True}
    change(folder / "tokenizer.json", lambda raw: raw["added_tokens"].append({"id": rows, **item}))
    settings = {"image_token": SPARE, "extra_special_tokens": {"image_token": SPARE}}
    change(folder / "tokenizer_config.json", lambda raw: raw.update(settings))
    change(
        folder / "tokenizer_config.json",
        lambda raw: raw.setdefault("added_tokens_decoder", {}).update({str(rows): item}),
    )
    (folder / "special_tokens_map.json").write_text(json.dumps({"image_token": {**item}}))
    (folder / "added_tokens.json").write_text(json.dumps({SPARE: rows}))
    assert load_tokenizer(folder).convert_tokens_to_ids(SPARE) == rows
    return folder


def change(path: Path, how: Any) -> None:
    raw = read_json(path)
    how(raw)
    path.write_text(json.dumps(raw), encoding="utf-8")


def test_the_checkpoint_has_a_tokenizer_without_it_and_says_so(model: Path, tiny_model: Path, tmp_path: Path) -> None:
    report = q.quantize(model, tmp_path / "base.qalora", RTN)
    assert any(SPARE in note and "no row" in note for note in report.notes)
    base = CanonicalCheckpoint(tmp_path / "base.qalora")
    ours, plain = load_tokenizer(base.path), load_tokenizer(tiny_model)
    assert ours.get_vocab() == plain.get_vocab()
    for text in ("Turn on the lamp", f"a{SPARE} b", ""):
        assert ours(text).input_ids == plain(text).input_ids
    tokenizer_entries(base.path, base.config)  # which refuses a token beyond the embedding
    assert SPARE not in "".join(path.read_text() for path in base.path.glob("*token*.json"))
    kept = ancestry(base.path, MergeCheck(), original=model)  # with what quantize reads of the model
    assert (kept.changed, len(kept.compared)) == ((), 1)


def test_the_plan_says_it_too(model: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    with open_forecast(model, RTN, tmp_path / "scratch") as forecast:
        assert any(SPARE in note for note in forecast.notes)


@pytest.mark.parametrize("needed", ["chat template", "eos_token"])
def test_a_token_that_is_needed_stays(model: Path, needed: str) -> None:
    assert spare_tokens(ModelFolder(model)) == [SPARE]
    if needed == "eos_token":
        change(model / "tokenizer_config.json", lambda raw: raw.update(eos_token=SPARE))
    else:
        (model / "chat_template.jinja").write_text(f"{{{{ messages[0].content }}}}{SPARE}")
    assert spare_tokens(ModelFolder(model)) == []


def test_other_models_and_files_stay_as_they_are(model: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert spare_tokens(ModelFolder(tiny_model)) == []
    (tmp_path / "restated").mkdir()
    found = WithoutSpareTokens(ModelFolder(model), [SPARE], tmp_path / "restated")
    assert read_json(found.path / "config.json") == read_json(model / "config.json")
    raw, before = (read_json(folder / "tokenizer.json") for folder in (found.path, tiny_model))
    assert raw == before
