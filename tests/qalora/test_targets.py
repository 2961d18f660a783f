"""What training leaves alone: 8 bits that are symmetric, grids without offsets of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.forecast import Forecast
from qalora_export.errors import InputError
from qalora_export.models.loading import load_model
from qalora_export.qalora.attach import attach
from qalora_export.qalora.targets import describe, left_alone, targeted
from qalora_export.quantization.rules import parse_rule
from qalora_export.quantization.stage import quantize
from qalora_export.recipe import QuantizeSettings, TrainSettings
from tests.models import make_tiny_model

SYMMETRIC, FREE = "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"
NO_OFFSETS = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("targets")
    make_tiny_model(folder / "model", hidden_size=256, head_dim=64)
    rules = (f"{SYMMETRIC}=bits:8,sym:true", f"{FREE}=bits:8", f"{NO_OFFSETS}=grid:q6_k")
    settings = QuantizeSettings(method="rtn", rules=tuple(map(parse_rule, rules)))
    quantize(folder / "model", folder / "base", settings)
    return folder / "base"


def test_names() -> None:
    modules = ["a.q", "a.v", "lm_head"]
    assert targeted(modules, ("*",), ("a.v", "lm_head")) == ["a.q"]
    assert targeted(modules, ("a.*", "lm_head"), ("a.v", "lm_head")) == ["a.q", "lm_head"]
    assert left_alone(("*.v",), ("a.v", "lm_head")) == ("a.v",)
    assert describe(["a.v", "b.v", "lm_head"]).startswith("not trained: 2 × v, lm_head: symmetric")


def test_a_checkpoint_knows_what_is_left_alone(base: Path) -> None:
    assert set(Forecast.of(CanonicalCheckpoint(base)).untrained) == {SYMMETRIC, NO_OFFSETS}


def test_adapters_go_where_they_can_be_exported(base: Path) -> None:
    untrained = Forecast.of(CanonicalCheckpoint(base)).untrained
    names = attach(load_model(base), TrainSettings(rank=2), untrained)
    assert SYMMETRIC not in names
    assert NO_OFFSETS not in names
    assert FREE in names
    assert len(names) == 12
    assert attach(load_model(base), TrainSettings(rank=2, targets=(SYMMETRIC,)), untrained) == [SYMMETRIC]
    with pytest.raises(InputError, match=r"every module that the targets match is left alone.*not trained"):
        attach(load_model(base), TrainSettings(rank=2, targets=("*.0.*.v_proj",)), untrained)
    with pytest.raises(InputError, match="cannot move the offsets of grid q6_k"):
        attach(load_model(base), TrainSettings(rank=2, targets=(NO_OFFSETS,)), untrained)
