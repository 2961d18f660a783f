"""Gate G6 on real runtimes: right exports pass; what tampering does to answers, ends, texts and defaults is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx as onnx_package
import pytest

from qalora_export.formats.gguf import export as gguf_export
from qalora_export.formats.gguf.export import export_gguf
from qalora_export.formats.gguf.metadata import Entry
from qalora_export.formats.onnx.export import export_onnx
from qalora_export.formats.onnx.layout import GRAPH
from qalora_export.models.loading import load_tokenizer
from qalora_export.verify.gates.behaviour_texts import same as alike
from qalora_export.verify.gates.g6_behaviour import behaviour
from qalora_export.verify.rule import Entry as Verdict
from qalora_export.verify.session import Session
from tests.models import make_tiny_canonical
from tests.verify.alone import session_of, target_of

Entries = dict[str, Entry]
ENDS = (5, 6, 7)  # beside the tokenizer's own


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, whose folder ends generation at four tokens."""
    folder = tmp_path_factory.mktemp("behaviour")
    source = Path(shutil.copytree(tiny_model, folder / "model"))
    settings = json.loads((source / "generation_config.json").read_text())
    settings["eos_token_id"] = [settings["eos_token_id"], *ENDS]
    (source / "generation_config.json").write_text(json.dumps(settings))
    return make_tiny_canonical(folder / "base.qalora", source)


@pytest.fixture
def session(checkpoint: Path, tmp_path: Path) -> Session:
    return session_of(checkpoint, tmp_path)


@pytest.fixture(scope="module")
def onnx(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "onnx"
    export_onnx(checkpoint, folder)
    return folder


def gguf(checkpoint: Path, folder: Path, change: Callable[[Entries], None], monkeypatch: pytest.MonkeyPatch) -> Path:
    """An export whose metadata is changed behind the exporter's back."""
    right = gguf_export.model_entries

    def changed(*arguments: Any, **options: Any) -> list[Entry]:
        entries = {entry.key: entry for entry in right(*arguments, **options)}
        change(entries)
        return list(entries.values())

    monkeypatch.setattr(gguf_export, "model_entries", changed)
    export_gguf(checkpoint, folder / "model.gguf")
    return folder / "model.gguf"


def brace(checkpoint: Path) -> int:
    return int(load_tokenizer(checkpoint).convert_tokens_to_ids("{"))


def put(entries: Entries, key: str, kind: str, value: Any) -> None:
    entries[key] = Entry(key, kind, value)


def failed(entry: Verdict) -> set[str]:
    return {check.figure for check in entry.checks if not check.passed}


def test_right_exports_pass_and_tell_what_was_asked(
    session: Session, onnx: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = gguf(checkpoint, tmp_path, lambda _: None, monkeypatch)
    for runtime, artifact in (("llama.cpp", file), ("onnxruntime", onnx), ("onnxruntime-genai", onnx)):
        entry = behaviour(target_of(session, runtime, artifact))
        assert entry.status == "pass", entry.where
        assert entry.figures is not None
        assert entry.figures["answers"] >= 3
        assert entry.figures["tokens"] > 24
        assert "4 end tokens; 369 ids" in entry.detail
        session.workdir.joinpath(runtime).mkdir(exist_ok=True)


@pytest.mark.parametrize(
    ("change", "figures", "named"),
    [
        (lambda e, b: put(e, "tokenizer.ggml.eot_token_id", "uint32", b), {"wrong_ends"}, "'{' ends generation"),
        (lambda e, _: e.pop("tokenizer.ggml.eom_token_id"), {"wrong_ends"}, "end token 6"),
        (
            lambda e, b: e["tokenizer.ggml.token_type"].value.__setitem__(b, 5),
            {"wrong_pieces"},
            "expected 'a{a', got 'aa'",
        ),
        (lambda e, _: put(e, "general.sampling.temp", "float32", 5.0), {"wrong_defaults"}, "temperature is 5.0"),
    ],
    ids=["an end token more", "an end token less", "a token typed unused", "a hot temperature"],
)
def test_tampered_metadata_of_gguf(
    change: Callable[[Entries, int], None],
    figures: set[str],
    named: str,
    checkpoint: Path,
    session: Session,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = gguf(checkpoint, tmp_path, lambda entries: change(entries, brace(checkpoint)), monkeypatch)
    entry = behaviour(target_of(session, "llama.cpp", file))
    assert entry.status == "fail"
    assert figures <= failed(entry)
    assert any(named in finding for finding in entry.where), entry.where


def edited(folder: Path, tmp_path: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    copy = Path(shutil.copytree(folder, tmp_path / "tampered"))
    raw = json.loads((copy / name).read_text())
    change(raw)
    (copy / name).write_text(json.dumps(raw))
    return copy


@pytest.mark.parametrize(
    ("runtime", "file", "change", "figures"),
    [
        (
            "onnxruntime-genai",
            "genai_config.json",
            lambda raw: raw["search"].update(do_sample=True, temperature=3.0, max_length=8, top_k=50),
            {"wrong_defaults", "deviations", "wrong_stops"},
        ),
        ("onnxruntime-genai", "genai_config.json", lambda raw: raw["model"]["eos_token_id"].pop(), {"wrong_ends"}),
        ("onnxruntime", "generation_config.json", lambda raw: raw["eos_token_id"].pop(), {"wrong_ends"}),
        ("onnxruntime", "generation_config.json", lambda raw: raw.update(do_sample=True), {"wrong_defaults"}),
        ("onnxruntime", "tokenizer.json", lambda raw: raw.pop("decoder"), {"wrong_texts", "wrong_pieces"}),
    ],
    ids=["search settings", "an end token less", "an end token less", "sampling", "no decoder"],
)
def test_tampered_files_of_an_onnx_folder(
    runtime: str,
    file: str,
    change: Callable[[dict[str, Any]], Any],
    figures: set[str],
    session: Session,
    onnx: Path,
    tmp_path: Path,
) -> None:
    entry = behaviour(target_of(session, runtime, edited(onnx, tmp_path, file, change)))
    assert entry.status == "fail"
    assert (failed(entry) & figures) == (figures & failed(entry) if len(figures) > 2 else figures)
    assert failed(entry) & figures, entry.where


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime-genai"])
def test_a_window_that_only_long_texts_reach(runtime: str, session: Session, onnx: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(onnx, tmp_path / "tampered"))
    model = onnx_package.load(copy / GRAPH, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            kept = [attribute for attribute in node.attribute if attribute.name != "local_window_size"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx_package.helper.make_attribute("local_window_size", 130)])
    (copy / GRAPH).write_bytes(model.SerializeToString())
    entry = behaviour(target_of(session, runtime, copy))
    assert failed(entry) == {"long_nmse"}
    assert "position 13" in entry.where[0]


@pytest.mark.parametrize(
    ("want", "got", "same"),
    [
        ("a\ufffdb", "a\ufffd\ufffdb", True),
        ("a\ufffd\ufffdb", "a<b", True),
        ("a\ufffdb", "axyzb", False),
        (" word", "word", True),
        ("wo rd", "word", False),
        ("a\ufffd", "a", True),
        ("a", "a\ufffd", False),
    ],
)
def test_texts_are_alike_but_for_bytes_that_are_no_text(want: str, got: str, same: bool) -> None:
    assert alike(want, got) is same


def test_an_answer_that_was_not_given_is_no_pass(session: Session, onnx: Path) -> None:
    target = target_of(session, "onnxruntime", onnx)
    right = session.runs.behaviour

    def without_pieces(*arguments: Any) -> dict[str, Any]:
        return right(*arguments) | {"ends": {"all": None, "forced": {str(e): "end" for e in session.generation.ends}}}

    session.runs = replace(session.runs)
    session.runs.behaviour = without_pieces  # type: ignore[method-assign]
    assert behaviour(target).status == "not run"
