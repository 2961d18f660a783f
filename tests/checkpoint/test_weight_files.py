"""Weights under the names that libraries give them."""

import json
import shutil
from pathlib import Path

import pytest

from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.checkpoint.weight_files import main_file, stems
from qalora_export.errors import InputError, QaloraError
from qalora_export.models.hub_download import weights
from qalora_export.models.sources import lacking

NAME = "gptq_model-4bit-128g"


def config(folder: Path, **changes: object) -> None:
    content = {"bits": 4, "group_size": 128, "model_file_base_name": None} | changes
    (folder / "quantize_config.json").write_text(json.dumps(content))


def test_model_comes_first_and_an_index_before_a_file(tmp_path: Path) -> None:
    config(tmp_path)
    assert main_file(tmp_path) is None
    for name in (f"{NAME}.safetensors", "model.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).touch()
        assert main_file(tmp_path) == name


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, NAME),
        ({"group_size": -1, "bits": 3}, "gptq_model-3bit--1g"),
        ({"model_file_base_name": "vicuna-GPTQ-4bit.compat.no-act-order"}, "vicuna-GPTQ-4bit.compat.no-act-order"),
    ],
)
def test_autogptqs_own_names_are_found(tiny_model: Path, tmp_path: Path, changes: dict, name: str) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (folder / "model.safetensors").rename(folder / f"{name}.safetensors")
    assert lacking(folder) == "model.safetensors"
    with pytest.raises(InputError, match="no safetensors weights here"):
        ModelFolder(folder)
    config(folder, **changes)
    assert len(ModelFolder(folder).names()) == len(ModelFolder(tiny_model).names())
    assert lacking(folder) is None
    assert f"{name}.safetensors" in weights(folder)


def test_the_config_of_the_model_tells_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"bits": 4, "group_size": 128}}))
    assert stems(tmp_path) == ["model", NAME]


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", ".hidden", "*", "x" * 300, 7, ["a"]])
def test_a_name_that_is_no_plain_name_is_not_looked_for(tmp_path: Path, name: object) -> None:
    config(tmp_path, model_file_base_name=name)
    assert set(stems(tmp_path)) <= {"model", NAME, "7"}


def test_a_damaged_config_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "quantize_config.json").write_text("{")
    with pytest.raises(QaloraError):
        stems(tmp_path)
