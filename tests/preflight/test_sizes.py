"""Sizes are foreseen from headers, and what no export could hold is refused from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.forecast import Forecast
from qalora_export.errors import InputError
from qalora_export.formats.gguf.check import check_gguf
from qalora_export.formats.onnx.check import check_onnx
from qalora_export.formats.onnx.export import export_onnx
from qalora_export.quantization.check import open_forecast
from qalora_export.recipe import GgufSettings, QuantizeRule, QuantizeSettings
from tests.models import make_tiny_canonical, make_tiny_model
from tests.verify.exports import Exported


def test_sizes_are_foreseen(tmp_path: Path, tiny_model: Path, tiny_canonical: Path, exported: Exported) -> None:
    with open_forecast(tiny_model, QuantizeSettings(method="rtn"), tmp_path) as forecast:
        there = Forecast.of(CanonicalCheckpoint(tiny_canonical))
        assert forecast.modules == there.modules and forecast.shapes == there.shapes
        assert forecast.nbytes == there.nbytes and forecast.plain.keys() == there.plain.keys()
    tensors = tiny_canonical / "model.safetensors"
    assert 0 <= tensors.stat().st_size - there.nbytes < 2**14  # the header
    gguf = check_gguf(there, GgufSettings(), ())
    assert 0 <= exported.gguf.stat().st_size - gguf < 2**16  # metadata and tokenizer
    data = sum(path.stat().st_size for path in exported.onnx.rglob("*") if "data" in path.name)
    assert 0 <= data - check_onnx(there) < 2**12 * 5 * len(there.shapes)  # tensors begin on pages


def test_eight_bits_fit_where_nothing_trains_them(tiny_model: Path, tmp_path: Path) -> None:
    rule = QuantizeRule(match="*.down_proj", bits=8, sym=True)
    with open_forecast(tiny_model, QuantizeSettings(method="rtn", rules=(rule,)), tmp_path) as forecast:
        down = [name for name in forecast.modules if name.endswith("down_proj")]
        assert check_gguf(forecast, GgufSettings(), [name for name in forecast.modules if name not in down]) > 0
        with pytest.raises(InputError, match="no exact GGUF type"):
            check_gguf(forecast, GgufSettings(), down)
        assert check_gguf(forecast, GgufSettings(layout="split"), down) > 0


def test_heads_that_onnx_runtime_cannot_run_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    """A folder our exporter wrote must run: 24 features a head, no multiple of 16, and 1.31 refuses them."""
    narrow = make_tiny_model(tmp_path / "model", head_dim=24)
    with (
        open_forecast(narrow, QuantizeSettings(method="rtn"), tmp_path / "scratch") as forecast,
        pytest.raises(InputError, match="attention heads of 24 features"),
    ):
        check_onnx(forecast)
    with pytest.raises(InputError, match="multiples of 16"):
        export_onnx(make_tiny_canonical(tmp_path / "base", narrow), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
