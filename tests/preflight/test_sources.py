"""The pre-flight opens every kind of source as quantize does, foresees what comes of it, refuses what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.forecast import Forecast
from qalora_export.errors import InputError, QaloraError
from qalora_export.formats.gguf.check import check_gguf
from qalora_export.formats.gguf.export import export_gguf
from qalora_export.pipeline import check
from qalora_export.quantization.check import open_forecast
from qalora_export.quantization.stage import quantize
from qalora_export.recipe import GgufSettings, QuantizeSettings, Recipe
from qalora_export.recipe_file import validated
from tests.models import make_tiny_canonical, make_tiny_model
from tests.quantization.gguf_files import rewritten
from tests.quantization.gptq_packer import make_gptq_folder

RTN = QuantizeSettings(method="rtn")


def empty(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def file(tiny_canonical: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "m.gguf"
    export_gguf(tiny_canonical, out)
    return out


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_0", "Q8_0", "Q5_0", "Q5_1", "F16"])
def test_a_gguf_file_is_foreseen_as_quantize_makes_it(file: Path, tmp_path: Path, kind: str) -> None:
    source = rewritten(
        file, tmp_path / "other.gguf", lambda name: "F16" if "embd" in name or "output" in name else kind
    )
    quantize(source, tmp_path / "base", RTN)
    there = Forecast.of(CanonicalCheckpoint(tmp_path / "base"))
    with open_forecast(source, RTN, empty(tmp_path / "scratch")) as forecast:
        assert forecast.modules == there.modules and forecast.shapes == there.shapes
        assert forecast.nbytes == there.nbytes
        # Whether the file can be written again, with its offsets as they are and with trained ones.
        for trained in ((), tuple(forecast.modules)):
            foreseen, known = (_size(one, trained) for one in (forecast, there))
            assert foreseen == known
            assert (foreseen is None) == (kind in ("Q8_0", "Q5_0") and bool(trained))


def _size(forecast: Forecast, trained: tuple[str, ...]) -> int | None:
    try:
        return check_gguf(forecast, GgufSettings(), trained)
    except InputError as error:
        assert "no exact GGUF type" in error.what
        return None


@pytest.mark.parametrize("bits", [4, 8])
def test_a_gptq_checkpoint_is_foreseen(tiny_model: Path, tmp_path: Path, bits: int) -> None:
    make_gptq_folder(folder := tmp_path / "gptq", tiny_model, bits=bits, group=64, sym=True)
    quantize(folder, tmp_path / "base", RTN)
    there = Forecast.of(CanonicalCheckpoint(tmp_path / "base"))
    with open_forecast(folder, RTN, empty(tmp_path / "scratch")) as forecast:
        assert forecast.modules == there.modules and forecast.nbytes == there.nbytes
        assert forecast.kept == frozenset(forecast.modules)


def changed(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def problems(model: Path | str, out: Path, **quantize: object) -> list[str]:
    raw = {
        "model": str(model),
        "out": str(out),
        "quantize": {"method": "rtn"} | quantize,
        "train": {"data": "none.jsonl"},
    }
    with pytest.raises(QaloraError) as caught:
        check(validated(Recipe, raw, where="test"))
    assert not out.exists()
    return [str(error) for error in caught.value.several or (caught.value,)]


def test_sources_that_quantize_refuses_are_refused_before_and_named(
    tiny_model: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each beside what else is wrong: training data that is not there."""
    out = tmp_path / "out"
    other = shutil.copytree(tiny_model, tmp_path / "other")
    changed(other, architectures=["BertForMaskedLM"])
    wide = make_tiny_model(tmp_path / "wide", hidden_size=96, num_attention_heads=3, num_key_value_heads=3)
    torn = shutil.copytree(tiny_model, tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:1000])
    tokenless = shutil.copytree(tiny_model, tmp_path / "tokenless")
    (tokenless / "tokenizer.json").write_text("{}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("QALORA_MAY_DOWNLOAD", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    cases = [
        (problems(other, out), "unsupported architecture BertForMaskedLM"),
        (problems(wide, out, group_size=64, strict_groups=True), "96 in-features do not divide into groups of 64"),
        (problems("Someone/Nothing", out), r"Someone/Nothing is no path on this machine"),
        (problems(torn, out), "truncated"),
        (problems(tokenless, out), "tokenizer"),
        (problems(file, out, rules=[{"match": "*", "skip": True}]), "rules cannot be applied"),
    ]
    for found, text in cases:
        assert any(text in line for line in found), (text, found)
        assert any("none.jsonl" in line for line in found), found


def test_tied_embeddings_that_differ_are_known_before(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    changed(folder, tie_word_embeddings=True)
    assert any("the weights differ" in line for line in problems(folder, tmp_path / "out"))


def test_errors_of_a_gguf_file_name_the_file_and_no_scratch(file: Path, tmp_path: Path) -> None:
    base = make_tiny_canonical(
        tmp_path / "wide", make_tiny_model(tmp_path / "m", hidden_size=256, intermediate_size=512)
    )
    export_gguf(base, tmp_path / "wide.gguf")
    source = rewritten(tmp_path / "wide.gguf", tmp_path / "k.gguf", lambda name: "F16" if "embd" in name else "Q3_K")
    found = problems(source, tmp_path / "out")
    assert any("no canonical form" in line and str(source) in line for line in found), found
    assert not any("qalora-check-" in line for line in found)


def test_activation_order_is_known_before_a_code_is_read(tiny_model: Path, tmp_path: Path) -> None:
    make_gptq_folder(folder := tmp_path / "gptq", tiny_model, config={"desc_act": True})
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("g_idx"))
    tensors[name] = np.random.default_rng(0).permutation(tensors[name])
    save_file(tensors, folder / "model.safetensors")
    assert any("do not lie together (desc_act" in line for line in problems(folder, tmp_path / "out"))
