"""Where a runtime computes another function than Transformers from some length on, exports end there and say so.

What the runtimes really do beyond is shown on each of them, so that a version that does otherwise is noticed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from qalora_runtimes.launch import run_runner
from qalora_runtimes.protocol import make_job

import qalora_export as q
from qalora_export.errors import InputError
from qalora_export.formats.gguf.file import GgufFile
from qalora_export.formats.gguf.model_config import config_from_gguf
from qalora_export.formats.gguf.read import read_back
from qalora_export.models.families import family_of, rope_of
from qalora_export.models.loading import load_model
from qalora_export.safety import read_json
from qalora_export.verify.runtimes.twin import write_twin
from tests.conftest import MadeOnce
from tests.models.families.small import LONGROPE, PARTIAL, make_small
from tests.models.families.test_families import LLAMA
from tests.runtimes.conftest import worst_nmse

ORIGINAL = LONGROPE["original_max_position_embeddings"]
PHI3 = LLAMA | {"architectures": ["Phi3ForCausalLM"], "num_attention_heads": 2, "sliding_window": None}
LONG = PHI3 | {key: value for key, value in LONGROPE.items() if key != "rope_parameters"}
LONG |= {"rope_scaling": {**LONGROPE["rope_parameters"], "type": "longrope"}, "partial_rotary_factor": 1.0}
WINDOW = {"sliding_window": 100}


def changed(**own: object) -> dict[str, Any]:
    return LONG | {"rope_scaling": LONG["rope_scaling"] | own}


@pytest.mark.parametrize(
    ("config", "gguf", "onnx"),
    [
        (PHI3, 128, 128),
        (PHI3 | WINDOW, 100, 128),
        (PHI3 | {"sliding_window": 128}, 128, 128),
        (LONG, 256, 256),
        (LONG | WINDOW, 100, 256),
        (LONG | {"max_position_embeddings": 256}, 256, 256),
        (LLAMA | {"architectures": ["MistralForCausalLM"]} | WINDOW, 100, 128),
    ],
)
def test_an_export_ends_where_the_function_would_be_another(config: dict[str, Any], gguf: int, onnx: int) -> None:
    family, own = family_of(config), config["max_position_embeddings"]
    for fmt, positions in (("gguf", gguf), ("onnx", onnx)):
        bound, exported = family.bound(config, fmt), family.exported(config, fmt)  # type: ignore[arg-type]
        assert exported["max_position_embeddings"] == positions
        assert (bound is None) == (positions == own)
        assert bound is None or f"{positions} positions, not the model's {own}" in str(bound)
        assert rope_of(exported).magnitude == rope_of(config).magnitude  # it follows from the model's own context


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (changed(short_factor=None), "short_factor"),
        (changed(long_factor=[1.0] * 15), "differ in length"),
        (changed(short_factor=[1.0] * 15, long_factor=[1.0] * 15), "15 factors for 32 rotated"),
        (changed(short_factor=[0.0] * 16), "short_factor"),
        (changed(attention_factor=-1.0), "attention_factor"),
        (changed(type="yarn", rope_type="yarn"), "yarn"),
        (LONG | {"original_max_position_embeddings": 300}, "300 positions"),
        ({key: value for key, value in LONG.items() if key != "original_max_position_embeddings"}, "4096"),
        (LONG | {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        (PHI3 | {"sliding_window": 0}, "sliding_window"),
        (PHI3 | {"sliding_window": "all"}, "sliding_window"),
        (LLAMA | {"architectures": ["MistralForCausalLM"]}, "Transformers assumes 4096"),
        (LLAMA | {"architectures": ["Qwen2ForCausalLM"], "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_would_be_guessed_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        family_of(config)


@pytest.mark.parametrize("stated", [None, 1.25])
@pytest.mark.parametrize("length", [ORIGINAL, ORIGINAL + 1])
def test_longrope_is_that_of_transformers(stated: float | None, length: int) -> None:
    from transformers import AutoConfig
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    own = {**LONGROPE, **PARTIAL, "hidden_size": 128}
    own["rope_parameters"] = own["rope_parameters"] | ({} if stated is None else {"attention_factor": stated})
    config = AutoConfig.for_model("phi3", **own)
    rope = rope_of(config.to_dict())
    positions = torch.arange(length)[None]
    cos, _ = Phi3RotaryEmbedding(config)(torch.zeros(1), positions)
    divisors = rope.short if length <= ORIGINAL else rope.long
    frequencies = rope.theta ** (-np.arange(0, 48, 2) / 48) / np.array(divisors)
    ours = np.cos(np.arange(length)[:, None] * frequencies) * rope.magnitude
    np.testing.assert_allclose(cos[0, :, :24].numpy(), ours, atol=1e-4)


@dataclass(frozen=True)
class Line:
    base: Path
    twin: Path
    onnx: Path


@pytest.fixture(scope="module")
def line(made_once: MadeOnce) -> Line:
    def make(folder: Path) -> None:
        base = folder / "base.qalora"
        q.quantize(make_small(folder / "model", "Phi-3, longrope"), base, q.QuantizeSettings(method="rtn"))
        gguf = q.export_gguf(base, folder / "model.gguf")
        onnx = q.export_onnx(base, folder / "onnx")
        assert all(any("256 positions, not the model's 1024" in note for note in r.notes) for r in (gguf, onnx))
        write_twin(folder / "model.gguf", folder / "twin.gguf")

    folder = made_once("bounds", make)
    return Line(folder / "base.qalora", folder / "twin.gguf", folder / "onnx")


def reference(base: Path, ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        logits = load_model(base, attention="eager")(torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
    return torch.log_softmax(logits.double(), -1).numpy()


def test_llama_cpp_beyond_the_original_context_is_transformers_for_longer_texts_only(
    line: Line, tmp_path: Path
) -> None:
    """It takes the long factors for every text of a context that is larger, which is why the file ends before."""
    ids = np.random.default_rng(0).integers(0, 300, ORIGINAL + 40).astype(np.int32)
    job = make_job([ids, ids[:20]])
    found = run_runner("llama.cpp", model=line.twin, job=job, workdir=tmp_path, exact=True)
    assert found.status == "ok", found.log
    assert found.fingerprint["settings"]["context"] > ORIGINAL
    longer, shorter = np.split(found.logprobs, [len(ids)])
    assert worst_nmse(longer, reference(line.base, ids)) < 1e-8
    assert worst_nmse(shorter, reference(line.base, ids[:20])) > 1e-3


def test_onnx_runtime_refuses_a_longer_text(line: Line, tmp_path: Path) -> None:
    job = make_job([np.zeros(ORIGINAL + 1, np.int32)])
    found = run_runner("onnxruntime", model=line.onnx, job=job, workdir=tmp_path)
    assert found.status != "ok"


def test_files_say_the_context_that_is_proven(line: Line) -> None:
    metadata = GgufFile(line.twin).metadata
    assert metadata["phi3.context_length"] == metadata["phi3.rope.scaling.original_context_length"] == ORIGINAL
    genai = read_json(line.onnx / "genai_config.json")
    assert genai["model"]["context_length"] == genai["search"]["max_length"] == ORIGINAL
    assert read_json(line.onnx / "config.json")["max_position_embeddings"] == ORIGINAL


def test_a_gguf_file_gives_the_config_back(line: Line) -> None:
    config, own = config_from_gguf(read_back(line.twin)), read_json(line.base / "config.json")
    ours, theirs = rope_of(config), rope_of(own)
    assert ours.original_context == theirs.original_context
    for name in ("short", "long", "magnitude"):
        assert np.array_equal(np.float32(getattr(ours, name)), np.float32(getattr(theirs, name)))


def test_a_file_of_llama_cpps_converter_names_a_window_that_llama_cpp_ignores(line: Line) -> None:
    ours = read_back(line.twin)
    metadata = dict(ours.metadata) | {"phi3.attention.sliding_window": 100, "phi3.context_length": 1024}
    parts = {name: getattr(ours, name) for name in ("types", "shape", "rope_factors", "path")}
    config = config_from_gguf(SimpleNamespace(metadata=metadata, **parts))  # type: ignore[arg-type]
    assert (config["sliding_window"], config["max_position_embeddings"]) == (100, 1024)
    bound = family_of(config).bound(config, "gguf")
    assert bound is not None
    assert bound.positions == 100
