"""What the real AutoRound wrote (golden/make_golden.py) in its packings that are GPTQ's: our reading equals its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.errors import InputError
from qalora_export.quantization.gptq_import import convert
from qalora_export.quantization.gptq_layer import Stored, check_layer, read_layer
from qalora_export.quantization.gptq_version import choose_version
from qalora_export.quantization.source import AUTO_ROUND_PACKINGS, gptq_config
from tests.quantization.test_gptq_golden import GOLDEN, fp16

with np.load(GOLDEN / "autoround.npz") as file:
    INFO = json.loads(file["info"].tobytes())
    CASES: dict[str, dict[str, np.ndarray]] = {case: {} for case in INFO["cases"]}
    for key in file.files:
        if "/" in key:
            CASES[key.split("/")[0]][key.split("/")[1]] = file[key]


def folder_of(path: Path, case: str, **changes: Any) -> ModelFolder:
    """The case as a layer `m` of a model folder with AutoRound's own config."""
    save_file({f"m.{part}": CASES[case][part] for part in ("qweight", "qzeros", "scales")}, path / "model.safetensors")
    config = {key: value for key, value in (INFO["cases"][case] | changes).items() if value is not None}
    (path / "config.json").write_text(json.dumps({"quantization_config": config}), encoding="utf-8")
    return ModelFolder(path)


def read(model: ModelFolder, shape: tuple[int, ...]) -> Stored:
    gptq, (out, width) = gptq_config(model), shape
    assert gptq is not None
    version = choose_version(model, gptq, {"m": (out, width)}, None)
    layer = check_layer(model, "m", (out, width), gptq)
    return read_layer(model, "m", layer, version.rule(layer.bits))


def test_both_packings_at_every_width_are_there() -> None:
    configs = INFO["cases"].values()
    assert INFO["version"] == "0.16.1"
    assert {config["quant_method"] for config in configs} == {"auto-round"}
    assert {config["packing_format"] for config in configs} == set(AUTO_ROUND_PACKINGS)
    assert {(config["bits"], config["sym"]) for config in configs} >= {(2, True), (3, True), (4, True), (8, True)}
    assert {(config["bits"], config["sym"]) for config in configs} >= {(2, False), (3, False), (4, False)}


@pytest.mark.parametrize("case", CASES)
def test_our_reading_equals_its_own(case: str, tmp_path: Path) -> None:
    weight = CASES[case]["weight"]
    stored = read(folder_of(tmp_path, case), weight.shape)
    assert np.array_equal(fp16(stored), weight)
    _, report = convert(stored, name="m")
    assert report.changed == 0 or not INFO["cases"][case]["sym"]


def test_one_packing_read_as_the_other_is_noticed(tmp_path: Path) -> None:
    for case, other in (("4-sym-auto_round-auto_gptq", "auto_round"), ("2-asym-auto_round", "auto_round:auto_gptq")):
        model = folder_of(tmp_path, case, packing_format=other)
        with pytest.raises(InputError, match="shifts every weight by one step"):
            read(model, CASES[case]["weight"].shape)


@pytest.mark.parametrize(
    "change",
    [
        {"packing_format": "auto_round:auto_awq"},
        {"packing_format": "auto_round:exllamav2"},
        {"packing_format": None},
        {"packing_format": ["auto_round"]},
        {"data_type": "mx_fp"},
        {"act_bits": 8},
    ],
)
def test_other_packings_are_refused_with_the_remedy(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"packing of AutoRound.*format='auto_gptq'"):
        gptq_config(folder_of(tmp_path, "4-sym-auto_round-auto_gptq", **change))
