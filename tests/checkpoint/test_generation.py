"""How a folder generates, against Transformers' own GenerationConfig."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from qalora_export.checkpoint.generation import NEUTRAL, SAMPLING, generation_config, generation_of
from qalora_export.errors import InputError


def written(folder: Path, **settings: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def test_what_a_folder_does_not_say_is_what_transformers_does(tmp_path: Path) -> None:
    defaults = GenerationConfig()._get_default_generation_params()
    found = generation_of(written(tmp_path), {})
    assert found.do_sample is defaults["do_sample"] is False
    for name in SAMPLING:
        assert getattr(found, name) == (defaults.get(name) or 0)
    for name, neutral in NEUTRAL.items():
        assert defaults.get(name) is None or defaults[name] in neutral
    assert generation_of(written(tmp_path, **{name: value for name, value in defaults.items() if value}), {}) == found


def test_ends_are_those_of_generation_config_or_else_of_config(tmp_path: Path) -> None:
    assert generation_of(tmp_path, {"eos_token_id": [3, 5, 3]}).ends == (3, 5)
    assert generation_of(written(tmp_path, eos_token_id=7), {"eos_token_id": [3, 5]}).ends == (7,)
    assert generation_of(written(tmp_path, temperature=1.0), {"eos_token_id": [3, 5]}).ends == (3, 5)
    assert generation_config(tmp_path, {"eos_token_id": 4}) == {"temperature": 1.0, "eos_token_id": 4}


def test_settings_that_others_have_no_place_for_are_named(tmp_path: Path) -> None:
    assert generation_of(written(tmp_path, num_beams=4, no_repeat_ngram_size=0), {}).other == ("num_beams",)


@pytest.mark.parametrize(
    "wrong",
    [
        {"eos_token_id": "2"},
        {"eos_token_id": [2, None]},
        {"eos_token_id": -1},
        {"temperature": "hot"},
        {"top_k": -3},
        {"do_sample": "yes"},
        {"top_p": float("nan")},
    ],
)
def test_values_of_another_kind_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        generation_of(written(tmp_path, **wrong), {})
