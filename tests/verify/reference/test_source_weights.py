"""A base's weights against the model they were quantized from: right ones of every width, rows of other numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.quantization.stage import quantize
from qalora_export.recipe import QuantizeSettings
from qalora_export.verify.reference.source_weights import MOST_SHARE, RATIO, changed_weights, row_errors

TEXT = "The quick brown fox jumps over the lazy dog. " * 200
MODULE = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(("bits", "group", "sym"), [(2, 32, False), (2, 128, True), (3, 64, False), (8, 32, False)])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_right_bases_are_right(method: str, bits: int, group: int, sym: bool, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    settings = {"method": method, "bits": bits, "group_size": group, "sym": sym, "calibration_samples": 8}
    more = {"calibration": str(tmp_path / "text.txt"), "sequence_length": 64}
    quantize(tiny_model, tmp_path / "base", QuantizeSettings(**settings, **more))
    assert changed_weights(ModelFolder(tiny_model), CanonicalCheckpoint(tmp_path / "base")) == []


def test_rows_of_another_matrix_and_of_the_other_sign_are_not_the_sources(
    tiny_model: Path, tiny_canonical: Path
) -> None:
    base, source = CanonicalCheckpoint(tiny_canonical), ModelFolder(tiny_model)
    right = np.asarray(source.tensor(f"{MODULE}.weight"))
    other = np.asarray(source.tensor(f"{MODULE.replace('layers.1', 'layers.0')}.weight"))
    for wrong in (other, -right, right[::-1]):
        ratios, shares = row_errors(base, MODULE, wrong)
        assert ratios.min() > RATIO
        assert shares.min() > MOST_SHARE / 2
    ratios, shares = row_errors(base, MODULE, right)
    assert ratios.max() < 1.5
    assert shares.max() < 0.1
    assert np.isinf(row_errors(base, MODULE, right[:-1])[0]).all()
