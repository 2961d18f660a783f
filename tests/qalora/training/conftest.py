"""Runs of the train stage on the tiny model."""

from pathlib import Path
from typing import Any

import pytest

from qalora_export.qalora.training.stage import TrainReport, train
from qalora_export.recipe import TrainSettings
from tests.qalora.training.runs import PlainRun, Runner, write_commands


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return {
        "data": str(write_commands(folder / "train.jsonl", 0, 24)),
        "validation": str(write_commands(folder / "validation.jsonl", 30, 37)),
    }


def chosen(files: dict[str, str], settings: dict[str, Any]) -> TrainSettings:
    return TrainSettings(**{**files, "batch_size": 8, "max_steps": 6, "rank": 4, **settings})


@pytest.fixture
def run(tiny_canonical: Path, files: dict[str, str], tmp_path: Path) -> Runner:
    def call(name: str = "adapter", *, force: bool = False, resume: bool = True, **settings: Any) -> TrainReport:
        return train(tiny_canonical, tmp_path / name, chosen(files, settings), force=force, resume=resume)

    return call


@pytest.fixture(scope="session")
def plain_run(tiny_canonical: Path, files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> PlainRun:
    """plain_run(**settings): a run that others are compared with, done once for the same settings; read-only."""
    done: dict[str, tuple[TrainReport, Path]] = {}

    def call(**settings: Any) -> tuple[TrainReport, Path]:
        key = repr(sorted(settings.items()))
        if key not in done:
            out = tmp_path_factory.mktemp("plain") / "adapter"
            done[key] = train(tiny_canonical, out, chosen(files, settings)), out
        return done[key]

    return call
