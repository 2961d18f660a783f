"""Where the shipped path's bound comes from: the given base, the base beside the checkpoint, or a simulation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from qalora_runtimes.launch import RunnerResult

from qalora_export.errors import InputError, RuntimeUnavailableError
from qalora_export.models.loading import load_tokenizer
from qalora_export.recipe import VerifySettings
from qalora_export.verify.probes.probe_set import make_probes
from qalora_export.verify.reference.noise_floor import ASSUMED_GAIN, NoiseFloor
from qalora_export.verify.runtimes.record import Artifact, all_runtimes
from qalora_export.verify.runtimes.runs import Runs
from tests.models import make_tiny_canonical
from tests.verify.exports import Exported
from tests.verify.fakes import FakeRuntimes, right_logprobs


def floor_of(exported: Exported, base: Path | None, workdir: Path, fake: FakeRuntimes) -> NoiseFloor:
    checkpoint = exported.checkpoint
    settings = json.loads((checkpoint / "config.json").read_text())
    probes = make_probes(load_tokenizer(checkpoint), settings, VerifySettings())
    reference = right_logprobs(checkpoint, probes.ids.tobytes(), probes.lengths.tobytes())
    runs = Runs(probes, settings["vocab_size"], workdir, 1, fake)
    return NoiseFloor(checkpoint, base, probes, reference, runs, 1, workdir)


def test_a_base_is_exported_run_and_compared_with_its_own_reference(
    exported: Exported, tiny_model: Path, tmp_path: Path
) -> None:
    base = make_tiny_canonical(tmp_path / "other.qalora", tiny_model, sym=True)
    (tmp_path / "work").mkdir()
    noise = np.random.default_rng(0)
    change = {("llama.cpp", "shipped", "prefill"): lambda x: (x + noise.normal(0, 0.3, x.shape)).astype(np.float32)}
    floor = floor_of(exported, base, tmp_path / "work", FakeRuntimes(base, changes=change))
    found = floor.of(all_runtimes()["llama.cpp"], Artifact(exported.gguf))
    assert found.gain_measured
    assert "other.qalora" in found.source
    assert found.measured_on_base is not None
    simulated = [floor.simulation(c, 32).summary() for c in (base, exported.checkpoint)]
    assert found.gain == pytest.approx(found.measured_on_base["nmse_mean"] / simulated[0].nmse_mean)
    assert found.figures["kl_mean"] == pytest.approx(found.gain * simulated[1].kl_mean)
    assert found.figures["perplexity_shift"] == pytest.approx(found.gain**0.5 * simulated[1].perplexity_shift)
    assert (tmp_path / "work" / "base-gguf" / "base.gguf").is_file()


def test_without_a_base_the_floor_is_simulated(exported: Exported, tmp_path: Path) -> None:
    floor = floor_of(exported, None, tmp_path, FakeRuntimes(exported.checkpoint))
    found = floor.of(all_runtimes()["onnxruntime"], Artifact(exported.onnx))
    assert not found.gain_measured
    assert found.gain == ASSUMED_GAIN
    assert 1e-6 < found.figures["kl_mean"] < 1e-1


def test_a_base_of_another_shape_is_refused(exported: Exported, tiny_model: Path, tmp_path: Path) -> None:
    base = make_tiny_canonical(tmp_path / "three.qalora", tiny_model, bits=3)
    floor = floor_of(exported, base, tmp_path, FakeRuntimes(exported.checkpoint))
    with pytest.raises(InputError, match="differ"):
        floor.of(all_runtimes()["llama.cpp"], Artifact(exported.gguf))


def test_a_base_that_crashes_the_runtime_gives_no_floor(exported: Exported, tiny_model: Path, tmp_path: Path) -> None:
    base = make_tiny_canonical(tmp_path / "other.qalora", tiny_model, sym=True)
    (tmp_path / "work").mkdir()
    broken = {("llama.cpp", "shipped", "prefill"): RunnerResult("crashed", "died", signal_name="SIGSEGV")}
    floor = floor_of(exported, base, tmp_path / "work", FakeRuntimes(base, broken=broken))
    with pytest.raises(RuntimeUnavailableError, match="died"):
        floor.of(all_runtimes()["llama.cpp"], Artifact(exported.gguf))
