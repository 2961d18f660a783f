"""`qalora-export export onnx` through its real entry point: a process of its own, exit code and output."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qalora_export.cli", "export", "onnx", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_exports_with_its_flags_and_names_the_next_command(tiny_canonical: Path, tmp_path: Path) -> None:
    result = run(str(tiny_canonical), "--out", str(tmp_path / "onnx"), "--accuracy-level", "1")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "onnx/manifest.json").read_text())["settings"]["accuracy_level"] == 1
    assert "values differing" in result.stderr and "verify-parity" in result.stderr
    again = run(str(tiny_canonical), "--out", str(tmp_path / "onnx"))
    assert again.returncode == 2 and "--force" in again.stderr


def test_unknown_accuracy_level_is_bad_usage(tiny_canonical: Path, tmp_path: Path) -> None:
    wrong = run(str(tiny_canonical), "--out", str(tmp_path / "other"), "--accuracy-level", "3")
    assert wrong.returncode == 2 and "accuracy_level" in wrong.stderr


def test_a_plain_model_folder_is_bad_input(tiny_model: Path, tmp_path: Path) -> None:
    result = run(str(tiny_model), "--out", str(tmp_path / "onnx"))
    assert result.returncode == 2 and "quantize" in result.stderr
    assert not (tmp_path / "onnx").exists()


def test_help_has_examples() -> None:
    result = run("--help")
    assert result.returncode == 0 and "Examples" in result.stdout
