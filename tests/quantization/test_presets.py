"""Presets against llama.cpp's rules, and what is said where a grid does not divide."""

from __future__ import annotations

import pytest

from qalora_export.errors import InputError
from qalora_export.grid import GRIDS
from qalora_export.quantization.presets import more_bits
from qalora_export.quantization.rules import Plan, Resolution, parse_rule, plan_of, resolve
from qalora_export.recipe import QuantizeSettings

EMBEDDING = {"model.embed_tokens": 256}
Q4, Q5, Q6 = (plan_of(GRIDS[name]) for name in ("q4_k", "q5_k", "q6_k"))


def resolved(*rules: str, tied: bool = False, width: int = 256, layers: int = 8, **values: object) -> Resolution:
    leaves = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    widths = {f"model.layers.{layer}.{leaf}": width for layer in range(layers) for leaf in leaves} | {"lm_head": 256}
    settings = QuantizeSettings(preset="q4_k_m", rules=tuple(map(parse_rule, rules)), **values)
    return resolve(settings, widths, inside="model.layers.", tied=tied, embeddings=EMBEDDING)


def test_layers_with_more_bits_are_llama_cpps() -> None:
    """Of 32 layers, as llama-quantize has it for a 7B Llama: the first and last four, every third between."""
    expected = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}
    assert {layer for layer in range(32) if more_bits(layer, 32)} == expected
    assert {layer for layer in range(4) if more_bits(layer, 4)} == {2, 3}


def test_q4_k_m_by_module() -> None:
    found = resolved()
    more = {layer for layer in range(8) if more_bits(layer, 8)}
    assert more == {0, 3, 6, 7}
    for layer in range(8):
        assert found.plans[f"model.layers.{layer}.self_attn.q_proj"] == Q4
        for leaf in ("self_attn.v_proj", "mlp.down_proj"):
            assert found.plans[f"model.layers.{layer}.{leaf}"] == (Q5 if layer in more else Q4)
    assert found.plans["lm_head"] == Q6
    assert found.embeddings == {"model.embed_tokens": Q4}
    assert found.notes() == ()


def test_an_embedding_that_is_the_head_has_its_bits() -> None:
    found = resolved(tied=True)
    assert "lm_head" not in found.plans
    assert found.embeddings == {"model.embed_tokens": Q6}


def test_a_rule_beats_the_preset() -> None:
    found = resolved(
        "*.0.self_attn.v_proj=grid:q6_k",
        "model.embed_tokens=skip",
        "lm_head=grid:q8_0",
        "*.1.*.q_proj=grid:q4_0",
        "*_proj=grid:q4_k",
    )
    assert found.plans["model.layers.0.self_attn.v_proj"] == Q6
    assert found.plans["model.layers.0.mlp.down_proj"] == Q4
    assert found.plans["lm_head"] == Plan(8, 32, True)
    assert found.plans["model.layers.1.self_attn.q_proj"] == Plan(4, 32, True)
    assert found.embeddings == {}


def test_what_does_not_divide_falls_back_and_the_plan_says_so() -> None:
    found = resolved("*.0.*.q_proj=grid:q6_k", width=192)
    assert found.plans["model.layers.0.self_attn.q_proj"] == Plan(8, 32, True)
    assert found.plans["model.layers.1.self_attn.q_proj"] == Plan(4, 32, False)
    assert found.plans["model.layers.0.self_attn.v_proj"] == Plan(5, 32, False)
    notes = found.notes()
    assert "1 × q_proj: grid q8_0 instead of q6_k, 192 in-features do not divide into super-blocks of 256" in notes
    assert "4 × v_proj: grid affine16 instead of q5_k, 192 in-features do not divide into super-blocks of 256" in notes


def test_a_grid_beside_a_preset_is_refused() -> None:
    with pytest.raises(InputError, match="preset q4_k_m and grid q5_k are two choices"):
        resolved(grid="q5_k")
    with pytest.raises(InputError, match=r"grid q4_k has 4 bits.*the settings say 8 bits"):
        resolved(bits=8)


def test_an_embedding_goes_into_blocks_only_by_its_name() -> None:
    settings = QuantizeSettings(rules=(parse_rule("*=bits:8"),))
    widths = {"model.layers.0.mlp.down_proj": 256}
    kwargs = {"inside": "model.layers.", "tied": True, "embeddings": EMBEDDING}
    assert resolve(settings, widths, **kwargs).embeddings == {}
    named = QuantizeSettings(rules=(parse_rule("model.embed_tokens=grid:q6_k"),))
    assert resolve(named, widths, **kwargs).embeddings == {"model.embed_tokens": Q6}
