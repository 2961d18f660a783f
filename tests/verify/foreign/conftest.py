"""A plain model and its unquantized GGUF, wide enough for K-quants; read-only."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import MadeOnce
from tests.models import make_tiny_model
from tests.verify.foreign.files import unquantized

BUILDER = "onnxruntime_genai.models.builder"
ROPE = {"rope_type": "default", "rope_theta": 500000.0}


@dataclass(frozen=True)
class Plain:
    model: Path
    gguf: Path


@pytest.fixture(scope="session")
def plain(made_once: MadeOnce) -> Plain:
    def make(folder: Path) -> None:
        make_tiny_model(folder / "model", hidden_size=256, intermediate_size=512, rope_parameters=ROPE)
        unquantized(folder / "model", folder)

    folder = made_once("foreign", make)
    return Plain(folder / "model", folder / "model-f16.gguf")


@pytest.fixture(scope="session")
def built_by_genai(plain: Plain, made_once: MadeOnce) -> Callable[[str], Path]:
    """precision -> the folder that GenAI's own builder makes of `plain`, read-only."""

    def built(precision: str) -> Path:
        name = f"built-{precision}"
        return made_once(name, lambda folder: build(plain.model, folder / "onnx", precision)) / "onnx"

    return built


def build(model: Path, out: Path, precision: str) -> None:
    """GenAI's own builder."""
    words = ["-m", BUILDER, "-i", model, "-o", out, "-p", precision, "-e", "cpu", "-c", out.parent / "cache"]
    command = [sys.executable, *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert ended.returncode == 0, ended.stderr[-1000:]
