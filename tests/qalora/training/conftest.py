"""Runs of the train stage on the tiny model."""

from pathlib import Path
from typing import Any

import pytest

from qalora_export.qalora.training.stage import TrainReport, train
from qalora_export.recipe import TrainSettings
from tests.qalora.training.runs import Runner, write_commands


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return {
        "data": str(write_commands(folder / "train.jsonl", 0, 24)),
        "validation": str(write_commands(folder / "validation.jsonl", 30, 37)),
    }


@pytest.fixture
def run(tiny_canonical: Path, files: dict[str, str], tmp_path: Path) -> Runner:
    def call(name: str = "adapter", *, force: bool = False, resume: bool = True, **settings: Any) -> TrainReport:
        chosen = TrainSettings(**{**files, "batch_size": 8, "max_steps": 6, "rank": 4, **settings})
        return train(tiny_canonical, tmp_path / name, chosen, force=force, resume=resume)

    return call
