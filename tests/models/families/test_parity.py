"""A family is admitted by this: its small model passes every gate on every runtime, and the bisect sees inside it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from qalora_runtimes.taps import run_taps

import qalora_export as q
from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.formats.onnx.exact import exact_variant
from qalora_export.models.families import FAMILIES, family_of
from qalora_export.verify.bisect.points import layer_points
from qalora_export.verify.bisect.search import bisect
from qalora_export.verify.bisect.values import ReferenceModel, Suspect, reader_of
from qalora_export.verify.gates.registry import all_gates
from qalora_export.verify.runtimes.record import Artifact
from qalora_export.verify.runtimes.twin import write_twin
from tests.conftest import MadeOnce
from tests.models import TEXT
from tests.models.families.small import CONFIGS, VARIANTS, make_small
from tests.models.families.tokenizers import GGUF_DIFFERS

pytestmark = pytest.mark.usefixtures("warm_runners")
TURNS = [{"role": "user", "content": "Turn on the lamp"}, {"role": "assistant", "content": "on: lamp"}]
SUSPECT = Suspect("G2", "exact", "prefill", "a sequence", (np.arange(24, dtype=np.int32) * 17) % 300)


RUNTIMES = {"gguf": ("llama.cpp",), "onnx": ("onnxruntime", "onnxruntime-genai")}


@dataclass(frozen=True)
class Line:
    """artifacts: by kind; without "onnx" where the family has no such export."""

    family: str
    base: Path
    artifacts: dict[str, Path]


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def line(request: pytest.FixtureRequest, made_once: MadeOnce) -> Line:
    def make(folder: Path) -> None:
        model, base, text = make_small(folder / "model", request.param), folder / "base.qalora", folder / "text.txt"
        text.write_text(TEXT, encoding="utf-8")
        gptq = q.QuantizeSettings(calibration=str(text), calibration_samples=2, sequence_length=32, sweeps=0)
        q.quantize(model, base, gptq)
        nearest = CONFIGS[request.param][1] in GGUF_DIFFERS
        q.export_gguf(base, folder / "model.gguf", q.GgufSettings(allow_text_differences=nearest))
        if family_of(CanonicalCheckpoint(base).config).onnx_refused:
            with pytest.raises(q.InputError, match="has no ONNX export"):
                q.export_onnx(base, folder / "onnx", q.OnnxSettings())
        else:
            q.export_onnx(base, folder / "onnx", q.OnnxSettings())

    folder = made_once(f"family-{request.param}", make)
    made = {"gguf": folder / "model.gguf", "onnx": folder / "onnx"}
    return Line(request.param, folder / "base.qalora", {kind: path for kind, path in made.items() if path.exists()})


def test_every_family_has_a_small_model() -> None:
    assert set(CONFIGS) == {family.name for family in FAMILIES} | set(VARIANTS)


def test_every_gate_passes_on_every_runtime(line: Line, tmp_path: Path) -> None:
    settings, artifacts = q.VerifySettings(threads=1), line.artifacts
    # Where only the GGUF file ends with the window, the ONNX folder is verified beyond it.
    apart = [{name: path} for name, path in artifacts.items()] if "windows" in line.family else [artifacts]
    gates = {}
    for index, some in enumerate(apart):
        report = q.verify_parity(line.base, tmp_path / f"report {index}", settings, **some)
        gates |= {(entry.gate, entry.runtime): entry.status for entry in report.entries}
        assert bool(report.facts["artifacts"][0]["context"]["note"]) == (line.family in VARIANTS and "gguf" in some)
    wanted = {(gate, runtime) for gate in all_gates() for kind in artifacts for runtime in RUNTIMES[kind]}
    assert set(gates) == wanted
    assert {key for key, status in gates.items() if status != "pass"} == set()


def test_codes_and_scales_stay_when_it_is_trained_and_merged(line: Line, tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text(f"{json.dumps({'messages': TURNS})}\n" * 4, encoding="utf-8")
    settings = q.TrainSettings(
        data=str(data), rank=4, batch_size=4, max_steps=2, learning_rate=0.05, sequence_length=128
    )
    q.train(line.base, tmp_path / "adapter", settings)
    merged = q.merge(line.base, tmp_path / "adapter", tmp_path / "merged.qalora")
    assert merged.adapted == merged.modules
    assert (merged.changed_codes, merged.changed_scales, merged.changed_other_tensors) == (0, 0, 0)
    assert 0 < merged.changed_offsets <= merged.offsets
    assert merged.logits_differing == 0


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_every_point_of_a_layer_agrees_with_the_reference(line: Line, kind: str, tmp_path: Path) -> None:
    if kind not in line.artifacts:
        pytest.skip("the family has no such export")
    checkpoint, artifact = CanonicalCheckpoint(line.base), line.artifacts[kind]
    if kind == "gguf":
        write_twin(artifact, tmp_path / "twin.gguf")
    run = Artifact(tmp_path / "twin.gguf") if kind == "gguf" else Artifact(exact_variant(artifact, tmp_path / "exact"))
    read = reader_of(kind, run, checkpoint, SUSPECT, tmp_path / "taps", threads=1, launch=run_taps)
    model = ReferenceModel(line.base, threads=1)
    family = family_of(checkpoint.config)
    found = bisect(kind, SUSPECT, model, 2, read, family=family, through="test")
    assert found.first is None, found.first
    points = layer_points(1, family.points)
    wanted, seen = model.activations(SUSPECT.ids, points), read(SUSPECT.ids, points)
    for point in points:
        if point.key in seen:
            np.testing.assert_allclose(seen[point.key], wanted[point.key], rtol=2e-3, atol=2e-3, err_msg=point.name)
    unseen = {replace(point, module="").name for point in points} - {p.name for p in points if p.key in seen}
    assert len(unseen) <= len(points) // 3, unseen
