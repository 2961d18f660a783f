"""The card says how the codes came about: quantized here, on which grid, or taken from a file that had them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qalora_export.checkpoint.manifest import write_manifest
from qalora_export.model_card import card
from qalora_export.recipe import Recipe
from qalora_export.recipe_file import validated

CASES = [
    ({}, None, "Quantized with GPTQ to 4 bits in groups of 32, fine-tuned"),
    ({"grid": "q4_k"}, "gptq", "Quantized with GPTQ to 4 bits in groups of 32 on the grid q4_k, fine-tuned"),
    ({"preset": "q4_k_m"}, "gptq", "Quantized with GPTQ by the preset q4_k_m, fine-tuned"),
    ({}, "import-gguf", "Taken as it was quantized (import-gguf), fine-tuned"),
    (
        {"method": "rtn", "bits": 3},
        "import-gguf + rtn",
        "Taken as it was quantized (import-gguf), in part quantized with RTN to 3 bits in groups of 32, fine-tuned",
    ),
]


@pytest.mark.parametrize(("quantize", "method", "sentence"), CASES)
def test_how_the_base_came_to_its_codes(
    quantize: dict[str, object], method: str | None, sentence: str, tmp_path: Path
) -> None:
    if method is not None:
        (tmp_path / "base.qalora").mkdir()
        write_manifest(tmp_path / "base.qalora", "base", tensors={}, parents=[], settings={"method": method})
    settings = {
        "model": "some/model",
        "out": str(tmp_path),
        "quantize": {"calibration": "text.txt", **quantize},
        "train": {"data": "train.jsonl"},
    }
    assert sentence in card(validated(Recipe, settings, where="test"))
