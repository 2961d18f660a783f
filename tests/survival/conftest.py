"""One driver for every module here: its imports are paid once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MadeOnce
from tests.survival.driven import Driver
from tests.survival.place import Place, make_original


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    with Driver(tmp_path_factory.mktemp("logs")) as process:
        yield process


@pytest.fixture(scope="session")
def original(tiny_model: Path, made_once: MadeOnce) -> Path:
    """Everything that a Place holds, made once; read-only."""
    return made_once("original", lambda folder: make_original(folder, tiny_model))


@pytest.fixture
def place(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    shutil.copytree(original, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return Place(tmp_path / "place")
