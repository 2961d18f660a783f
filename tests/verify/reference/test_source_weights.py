"""A base's weights against the model they were quantized from: right ones of every width, rows of other numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.grid import PackedAffine
from qalora_export.quantization.stage import quantize
from qalora_export.recipe import QuantizeSettings
from qalora_export.verify.reference.source_weights import changed_weights, closeness, packed_elsewhere
from tests.models import make_tiny_model
from tests.quantization.gptq_packer import make_gptq_folder

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
        assert closeness(base, MODULE, wrong).wrong.size >= len(right) - 1  # one row in the middle stays, reversed
    found = closeness(base, MODULE, right)
    assert (found.ratio.max(), found.cosine.min()) < (1.5, 1.0)
    assert found.cosine.min() > 0.98
    assert found.describe() == ""
    assert closeness(base, MODULE, right[:-1]).wrong.size == len(right)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [False, True])
def test_rows_and_groups_of_nothing_are_not_the_sources(bits: int, sym: bool, tiny_model: Path, tmp_path: Path) -> None:
    """At 2 bits a row of zeros is nearer to its source than GPTQ's own rows may be; its direction tells."""
    settings = QuantizeSettings(method="rtn", bits=bits, group_size=32, sym=sym)
    quantize(tiny_model, tmp_path / "base", settings)
    base = CanonicalCheckpoint(tmp_path / "base")
    right = np.asarray(ModelFolder(tiny_model).tensor(f"{MODULE}.weight"))
    assert closeness(base, MODULE, right).describe() == ""
    # The base stays and the source is what it could not have come from, which is the same.
    grouped = base.group_affine(MODULE).dequantize().reshape(len(right), -1, 32)
    swapped = right.reshape(grouped.shape).copy()
    swapped[7] = np.roll(swapped[7], 1, axis=0)  # the groups of one row, by one place
    assert closeness(base, MODULE, swapped.reshape(right.shape)).wrong.tolist() == [7]
    half = right.reshape(grouped.shape).copy()
    half[:16, 1] = -half[:16, 1]  # one group in each of some rows
    found = closeness(base, MODULE, half.reshape(right.shape))
    assert found.strange[:16].sum() >= 14  # groups of small numbers do not count
    assert found.strange[16:].sum() == 0
    assert found.describe()


def test_a_row_of_zeros(tiny_model: Path, tmp_path: Path) -> None:
    class Zeroed(CanonicalCheckpoint):
        def packed(self, name: str, rows: Any = slice(None)) -> PackedAffine:
            matrix = super().packed(name, rows)
            scale, offset = matrix.scale.copy(), matrix.offset.copy()
            scale[3] = offset[3] = 0
            return replace(matrix, scale=scale, offset=offset)

    quantize(tiny_model, tmp_path / "base", QuantizeSettings(method="rtn", bits=2, group_size=128))
    right = np.asarray(ModelFolder(tiny_model).tensor(f"{MODULE}.weight"))
    assert closeness(Zeroed(tmp_path / "base"), MODULE, right).wrong.tolist() == [3]
    emptied = right.copy()
    emptied[3] = 0
    assert closeness(Zeroed(tmp_path / "base"), MODULE, emptied).describe() == ""
    assert closeness(CanonicalCheckpoint(tmp_path / "base"), MODULE, emptied).wrong.tolist() == [3]


@pytest.mark.parametrize("bits", [2, 8])
def test_bases_of_models_with_outliers_are_right(bits: int, tmp_path: Path) -> None:
    """GPTQ gives quiet channels the errors of a loud one to bear: their rows are far off, in the source's direction."""
    make_tiny_model(tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if "norm" in name]:
        tensors[name][5] *= 64
    save_file(tensors, file, metadata={"format": "pt"})
    (tmp_path / "text.txt").write_text(TEXT)
    settings = {"bits": bits, "group_size": 32, "sym": True, "calibration_samples": 8, "sequence_length": 64}
    more = {"calibration": str(tmp_path / "text.txt")}
    quantize(tmp_path / "model", tmp_path / "base", QuantizeSettings(**settings, **more))
    assert changed_weights(ModelFolder(tmp_path / "model"), CanonicalCheckpoint(tmp_path / "base")) == []


@pytest.mark.parametrize("stored", ["gptq", "gptq_v2"])
def test_an_imported_base_is_held_against_the_codes_it_was_made_from(
    stored: str, tiny_model: Path, tmp_path: Path
) -> None:
    make_gptq_folder(tmp_path / "gptq", tiny_model, bits=4, stored=stored, sym=False)
    make_gptq_folder(tmp_path / "other", tiny_model, bits=4, stored=stored, sym=False, seed=1)
    quantize(tmp_path / "gptq", tmp_path / "base", QuantizeSettings())
    source, other, base = ModelFolder(tmp_path / "gptq"), ModelFolder(tmp_path / "other"), tmp_path / "base"
    assert changed_weights(source, CanonicalCheckpoint(base)) == []
    assert packed_elsewhere(source, CanonicalCheckpoint(base)) == 0
    found = changed_weights(other, CanonicalCheckpoint(base))
    assert len(found) == len(CanonicalCheckpoint(base).modules)
    assert "codes, scales and offsets other than in what it was made from" in found[0]


def test_what_no_import_reads_is_counted(tiny_model: Path, tmp_path: Path) -> None:
    make_gptq_folder(tmp_path / "gptq", tiny_model, bits=4)
    quantize(tmp_path / "gptq", tmp_path / "base", QuantizeSettings())
    config = json.loads((tmp_path / "gptq/config.json").read_text())
    config["quantization_config"]["quant_method"] = "awq"
    (tmp_path / "gptq/config.json").write_text(json.dumps(config))
    base, source = CanonicalCheckpoint(tmp_path / "base"), ModelFolder(tmp_path / "gptq")
    assert packed_elsewhere(source, base) == len(base.modules)
