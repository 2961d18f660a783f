"""A folder with everything in it, for tests that damage one thing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import MadeOnce
from tests.survival.inputs import Inputs, fill
from tests.survival.place import Place, make_original
from tests.verify.exports import Exported


@pytest.fixture(scope="session")
def original(tiny_model: Path, made_once: MadeOnce) -> Path:
    """Everything that a Place holds, made once; read-only."""
    return made_once("original", lambda folder: make_original(folder, tiny_model))


@pytest.fixture
def place(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    shutil.copytree(original, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return Place(tmp_path / "place")


@pytest.fixture(scope="session")
def inputs(tiny_model: Path, tiny_canonical: Path, exported: Exported, made_once: MadeOnce) -> Inputs:
    folder = made_once("inputs", lambda folder: fill(folder, tiny_canonical))
    return Inputs(folder, tiny_model, tiny_canonical, exported)
