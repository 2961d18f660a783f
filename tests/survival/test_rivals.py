"""Two commands with one --out, started together: one succeeds, the other is told so, and the output is the winner's."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from qalora_export.checkpoint.manifest import read_manifest, verify_files, verify_manifest
from tests.survival.driven import Driver, write_recipe
from tests.survival.inputs import Inputs

REFUSED = re.compile(r"another command is writing|the output exists already|replaces only what")


# stage -> the two commands, and where the manifest of their output says which of them made it
def commands(stage: str, inputs: Inputs, out: Path) -> tuple[tuple[object, ...], tuple[object, ...]]:
    base, train = inputs.base, ("train", inputs.base, "--data", inputs.data, "--out", out / "adapter")
    gguf = ("export", "gguf", base, "--out", out / "model.gguf")
    score = ("evaluate", base, "--data", inputs.data, "--max-new-tokens", 2, "--out", out / "score.json")
    return {
        "quantize": (
            ("quantize", inputs.model, "--out", out / "base.qalora", "--method", "rtn", "--bits", 4),
            ("quantize", inputs.model, "--out", out / "base.qalora", "--method", "rtn", "--bits", 8),
        ),
        "train": ((*train, "--max-steps", 2, "--rank", 2), (*train, "--max-steps", 2, "--rank", 3)),
        "merge": (
            ("merge", base, inputs.adapters[0], "--out", out / "merged.qalora"),
            ("merge", base, inputs.adapters[1], "--out", out / "merged.qalora"),
        ),
        "export gguf": ((*gguf, "--layout", "q4_1"), (*gguf, "--layout", "split")),
        "export adapter": tuple(
            ("export", "gguf", base, "--adapter", adapter, "--out", out / "lora.gguf") for adapter in inputs.adapters
        ),
        "export onnx": tuple(
            ("export", "onnx", base, "--out", out / "onnx", "--accuracy-level", level) for level in (4, 1)
        ),
        "evaluate": ((*score, "--limit", 2), (*score, "--limit", 3)),
    }[stage]  # type: ignore[return-value]


def made_by(stage: str, out: Path) -> Any:
    """What tells the output of one command from the other's; fails when the output is not whole."""
    if stage == "evaluate":
        return json.loads((out / "score.json").read_text())["total"]
    if stage in ("export gguf", "export adapter"):
        name = "model.gguf" if stage == "export gguf" else "lora.gguf"
        manifest = json.loads((out / f"{name}.manifest.json").read_text())
        assert verify_files(out, manifest["files"]) == []
        return manifest["settings"]["layout"] if stage == "export gguf" else manifest["parents"][1]["name"]
    folder = next(path for path in out.iterdir() if path.suffix != ".training")
    assert verify_manifest(folder) == []
    manifest = read_manifest(folder)
    settings = manifest["settings"]
    match stage:
        case "quantize":
            return settings["bits"]
        case "train":
            return settings["train"]["rank"]
        case "merge":
            return manifest["parents"][1]["name"]
    return settings["accuracy_level"]


MAKERS = {
    "quantize": (4, 8),
    "train": (2, 3),
    "merge": ("one", "two"),
    "export gguf": ("q4_1", "split"),
    "export adapter": ("one", "two"),
    "export onnx": (4, 1),
    "evaluate": (2, 3),
}
TRIALS = {"train": 2, "export onnx": 2}


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize("stage", MAKERS)
def test_one_succeeds_and_the_other_is_refused(driver: Driver, inputs: Inputs, stage: str, tmp_path: Path) -> None:
    moments = random.Random(stage)
    for trial in range(TRIALS.get(stage, 4)):
        out = tmp_path / str(trial)
        out.mkdir()
        results = driver.rivals(*commands(stage, inputs, out), apart=moments.choice([0.0, 0.02, 0.2]))
        codes = [code for code, _ in results]
        assert sorted(codes) == [0, 2], results
        assert REFUSED.search(results[codes.index(2)][1]), results
        assert made_by(stage, out) == MAKERS[stage][codes.index(0)]
        assert left_over(out) == []


@pytest.mark.parametrize("stage", ["quantize", "export gguf", "evaluate"])
def test_with_force_the_output_is_that_of_a_command_that_succeeded(
    driver: Driver, inputs: Inputs, stage: str, tmp_path: Path
) -> None:
    moments = random.Random(stage)
    first, second = commands(stage, inputs, tmp_path)
    for _ in range(4):
        results = driver.rivals((*first, "--force"), (*second, "--force"), apart=moments.choice([0.0, 0.02, 0.2]))
        succeeded = [maker for maker, (code, _) in zip(MAKERS[stage], results, strict=True) if code == 0]
        assert succeeded and all(code == 0 or REFUSED.search(said) for code, said in results), results
        assert made_by(stage, tmp_path) in succeeded
        assert left_over(tmp_path) == []


@pytest.mark.slow
def test_verify_parity_and_run_have_one_writer(driver: Driver, inputs: Inputs, tmp_path: Path) -> None:
    artifacts = inputs.artifacts
    report = ("verify-parity", artifacts.checkpoint, "--gguf", artifacts.gguf, "--out", tmp_path / "report")
    results = driver.rivals(report, report)
    assert sorted(code for code, _ in results) == [0, 2], results
    assert verify_manifest(tmp_path / "report") == []

    recipe = write_recipe(tmp_path)
    run = ("run", recipe, "--set", f"model={inputs.model}", "--set", 'verify.runtimes=["llama.cpp"]')
    results = driver.rivals((*run, "--set", "quantize.bits=4"), (*run, "--set", "quantize.bits=8"), apart=0.05)
    assert sorted(code for code, _ in results)[-1] == 2, results
    for name in ("base.qalora", "merged.qalora", "adapter", "onnx"):
        assert verify_manifest(tmp_path / "out" / name) == []
