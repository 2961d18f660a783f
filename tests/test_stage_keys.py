"""What makes a stage run again: its key changes with everything its result depends on, and with nothing else."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qalora_export import installed, stage_keys
from qalora_export.recipe import EvaluateSettings, QuantizeSettings
from qalora_export.stage_keys import intact, output_hash, stage_key

STAGES = ("quantize", "train", "merge", "export gguf", "export onnx", "verify-parity")


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Hashes of packages and code are kept for the time of a process; each test is one of its own."""
    kept = [f for module in (installed, stage_keys) for f in vars(module).values() if hasattr(f, "cache_clear")]
    assert kept
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


def keys(*inputs: Path) -> dict[str, str]:
    return {stage: stage_key(stage, inputs, None) for stage in STAGES}


def changed(before: dict[str, str], *inputs: Path) -> set[str]:
    for module in (installed, stage_keys):
        for function in vars(module).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()
    return {stage for stage, key in keys(*inputs).items() if key != before[stage]}


@pytest.mark.parametrize(
    ("package", "stages"),
    [("torch", set(STAGES)), ("gguf", {"export gguf", "verify-parity"}), ("onnxruntime", {"verify-parity"})],
)
def test_another_version_of_a_package(package: str, stages: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before, found = keys(), importlib.metadata.distribution

    class Other:
        version = "99.0"

        def read_text(self, _: str) -> str:
            return ""

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Other() if name == package else found(name))
    assert changed(before) == stages


def test_an_edited_template_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of the two packages is code: here the template of the report, in a copy."""
    copy = tmp_path / "qalora_export"
    shutil.copytree(Path(stage_keys.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(installed, "__file__", str(copy / "installed.py"))
    monkeypatch.setattr(stage_keys, "__file__", str(copy / "stage_keys.py"))
    before = keys()
    assert changed(before) == set()
    template = next(path for path in copy.rglob("*") if path.suffix not in (".py", ".pyc", ".md") and path.is_file())
    template.write_text(template.read_text() + " ")
    assert changed(before) == set(STAGES)


def test_a_source_folder_with_any_manifest_json_counts_by_its_files(tiny_model: Path, tmp_path: Path) -> None:
    """Only a manifest of ours stands for a folder."""
    source = shutil.copytree(tiny_model, tmp_path / "model")
    (source / "manifest.json").write_text(json.dumps({"format": "of another tool", "files": {}}))
    before = stage_key("quantize", [source], QuantizeSettings())
    assert stage_key("quantize", [source], QuantizeSettings()) == before
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert stage_key("quantize", [source], QuantizeSettings()) != before


def test_an_edited_output_is_not_intact(tiny_canonical: Path, tmp_path: Path) -> None:
    output = shutil.copytree(tiny_canonical, tmp_path / "base.qalora")
    recorded = output_hash(output)
    assert intact(output, recorded)
    (output / "config.json").write_text((output / "config.json").read_text() + " ")
    assert output_hash(output) == recorded  # the manifest is as it was
    assert not intact(output, recorded)
    shutil.copyfile(tiny_canonical / "config.json", output / "config.json")
    assert intact(output, recorded)
    (output / "config.json").unlink()
    assert not intact(output, recorded)


def test_settings_count_and_paths_count_by_their_content(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    moved = Path(shutil.copyfile(data, tmp_path / "moved.jsonl"))
    key = stage_key("evaluate base", [data], EvaluateSettings(data=str(data)))
    assert stage_key("evaluate base", [moved], EvaluateSettings(data=str(moved))) == key
    assert stage_key("evaluate base", [data], EvaluateSettings(data=str(data), limit=3)) != key
    data.write_text("{}\n\n")
    assert stage_key("evaluate base", [data], EvaluateSettings(data=str(data))) != key
