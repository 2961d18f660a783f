"""Settings of a GGUF file that are not the model's are read, and each can be tried; absence means what it means."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qalora_export.formats.gguf.file import GgufFile
from qalora_export.verify.foreign.ends import gguf_sampling_differences
from qalora_export.verify.foreign.metadata import complete_config, gguf_differences
from tests.verify.foreign.conftest import ROPE, Plain
from tests.verify.foreign.files import GONE

FREQUENCIES = ROPE["rope_theta"] ** (-np.arange(0, 64, 2) / 64)


def said(plain: Plain, changes: dict[str, Any], divisors: Any = None) -> list[str]:
    metadata = {**GgufFile(plain.gguf).metadata, **changes}
    metadata = {key: value for key, value in metadata.items() if value is not GONE}
    found = gguf_differences(metadata, complete_config(plain.model), divisors, FREQUENCIES)
    assert all(difference.can_be_tried for difference in found)
    return [difference.said for difference in found]


def test_a_right_file_has_none(plain: Plain) -> None:
    assert said(plain, {}) == []
    assert (
        said(plain, {"llama.attention.key_length": GONE, "llama.vocab_size": GONE, "llama.attention.scale": 0.0}) == []
    )


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("llama.rope.freq_base", 10000.0, "llama.rope.freq_base is 10000, the model's is 500000"),
        ("llama.rope.freq_base", GONE, "llama.rope.freq_base is 10000, the model's is 500000"),
        ("llama.attention.layer_norm_rms_epsilon", 1e-6, "llama.attention.layer_norm_rms_epsilon is 1e-06"),
        ("llama.attention.sliding_window", 64, "llama.attention.sliding_window is 64"),
        ("llama.embedding_scale", 2.0, "llama.embedding_scale is 2"),
    ],
)
def test_a_difference_is_told(key: str, value: Any, expected: str, plain: Plain) -> None:
    (line,) = said(plain, {key: value})
    assert line.startswith(expected)


def test_scaling_of_the_rotation_is_told(plain: Plain) -> None:
    (linear,) = said(plain, {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0})
    assert linear.startswith("llama.rope.scaling.type is 'linear'")
    (untyped,) = said(plain, {"llama.rope.scaling.factor": 4.0})  # linear to llama.cpp
    assert untyped.startswith("llama.rope.scaling.factor is 4")
    assert said(plain, {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}) == []
    (divisors,) = said(plain, {}, np.full(32, 8.0, np.float32))
    assert divisors.startswith("rope_freqs.weight is")


def test_sampling_that_the_model_does_not_ask_for_is_told() -> None:
    assert gguf_sampling_differences({}, {"temperature": 0.2, "do_sample": True}) == []
    assert gguf_sampling_differences({"general.sampling.temp": 5.0}, {}) != []
    generation = {"do_sample": True, "temperature": 0.6, "top_k": 20}
    same = {"general.sampling.temp": 0.6, "general.sampling.top_k": 20}
    assert gguf_sampling_differences(same, generation) == []
    assert gguf_sampling_differences(same | {"general.sampling.top_k": 40}, generation) == [
        "sampling top_k is 40, the model's 20"
    ]
