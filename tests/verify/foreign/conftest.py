"""A plain model and its unquantized GGUF, wide enough for K-quants; read-only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import MadeOnce
from tests.models import make_tiny_model
from tests.verify.foreign.files import unquantized

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
