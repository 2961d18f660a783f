"""Time grows with the work and shrinks with the machine; the sample is foretold within a factor of three."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from qalora_export.checkpoint.forecast import Forecast
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.preflight import estimates
from qalora_export.preflight.machine import Machine
from qalora_export.recipe import EvaluateSettings, QuantizeSettings
from qalora_export.verify.check import VerifyForecast

ROOT = Path(__file__).parent.parent.parent
CORE = Machine(flops=1e11, write=5e8, hash=6e8, free=2**40)  # one core with AVX-512
# CPU seconds of the sample on such a core: quantize with 16,384 tokens, without sweeps and with two; 60 questions.
MEASURED = {"quantize, 0 sweeps": 9.3, "quantize, 2 sweeps": 15.6, "evaluate": 4.7}


@pytest.fixture(scope="module")
def sample() -> Forecast:
    """The sample's base, every decoder matrix at 4 bits in groups of 32; headers only."""
    folder = ModelFolder(ROOT / "samples/base/model")
    shapes = {
        name.removesuffix(".weight"): (entry.shape[0], entry.shape[1])
        for name in folder.names()
        if name.endswith("_proj.weight") and (entry := folder.entry(name))
    }
    plain = {name: folder.entry(name) for name in folder.names() if name.removesuffix(".weight") not in shapes}
    return Forecast(folder, dict.fromkeys(shapes, (4, 32)), shapes, plain, calibration_tokens=16_384)


def test_the_sample_within_a_factor_of_three(sample: Forecast) -> None:
    found = {
        f"quantize, {n} sweeps": estimates.quantize(sample, QuantizeSettings(sweeps=n), CORE).seconds for n in (0, 2)
    } | {"evaluate": estimates.evaluate(sample, EvaluateSettings(data="x"), [40] * 60, CORE).seconds}
    for name, seconds in MEASURED.items():
        assert seconds / 3 < found[name] < seconds * 3, (name, found[name])


def test_time_follows_work_and_machine(sample: Forecast) -> None:
    slow = dataclasses.replace(CORE, flops=CORE.flops / 10)
    settings = QuantizeSettings()
    once, slower = (estimates.quantize(sample, settings, machine).seconds for machine in (CORE, slow))
    assert 5 < slower / once < 10
    twice = dataclasses.replace(sample, calibration_tokens=2 * 16_384)
    assert estimates.quantize(twice, settings, CORE).seconds > 1.3 * once
    rounding = dataclasses.replace(sample, calibration_tokens=0)
    assert estimates.quantize(rounding, QuantizeSettings(method="rtn"), CORE).seconds < once / 3
    assert estimates.merge(sample, CORE).disk == sample.nbytes


def test_disk_is_what_stays_and_the_largest_of_what_goes() -> None:
    stages = {
        "a": estimates.StageForecast(10, workspace=5),
        "b": estimates.StageForecast(20, workspace=7),
    }
    assert estimates.needed(stages) == 37
    assert estimates.needed({}) == 0


def test_a_task_is_asked_of_three_models_and_two_paths_of_every_runtime(sample: Forecast) -> None:
    found, asked = VerifyForecast(10, 1000, 2**20), EvaluateSettings(data="x")
    one = estimates.answering(sample, asked, [40] * 32, CORE)
    assert estimates.evaluate(sample, asked, [40] * 32, CORE).seconds == pytest.approx(estimates.START_SECONDS + one)
    alone = estimates.verify(sample, found, ["llama.cpp", "onnxruntime"], CORE).seconds
    with_task = estimates.verify(sample, found, ["llama.cpp", "onnxruntime"], CORE, answers=one).seconds
    assert with_task - alone == pytest.approx(7 * one)
