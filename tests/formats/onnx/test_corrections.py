"""Where mobius-onnx builds another function than Transformers: each fault shown on its own graph, then corrected.

A test that finds the fault gone tells that the pinned version has changed and the correction can go.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qalora_export.formats.onnx import corrections
from qalora_export.formats.onnx.graph import PROVIDER, _register_provider
from qalora_export.models.families.rope import Rope, rope_tables

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def graph_of(folder: Path, model_type: str, **own: object) -> ir.Model:
    """mobius' graph without weights, uncorrected."""
    import mobius
    from transformers import AutoConfig

    _register_provider()
    AutoConfig.for_model(model_type, **{**SIZES, **own}).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    names = {
        "gemma2": "Gemma2ForCausalLM",
        "gemma3_text": "Gemma3ForCausalLM",
        "smollm3": "SmolLM3ForCausalLM",
        "phi3": "Phi3ForCausalLM",
        "ernie4_5": "Ernie4_5ForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [names[model_type]]}))
    package = mobius.build(str(folder), execution_provider=PROVIDER, dtype="f32", load_weights=False)
    return package["model"]


def attention(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "GroupQueryAttention"]


def test_a_tied_head_asks_for_a_tensor_of_its_own(tmp_path: Path) -> None:
    model = graph_of(tmp_path, "smollm3", num_hidden_layers=2, tie_word_embeddings=True)
    assert corrections.HEAD in model.graph.initializers
    corrections.tie_head(model)
    assert corrections.HEAD not in model.graph.initializers
    assert len(list(model.graph.initializers[corrections.EMBEDDING].uses())) == 2


def test_sliding_windows_are_lost(tmp_path: Path) -> None:
    model = graph_of(tmp_path, "gemma2", num_hidden_layers=2, head_dim=32, sliding_window=16)
    assert [node.attributes.get_int("local_window_size", -1) for node in attention(model)] == [-1, -1]
    corrections.limit_windows(model, (True, False), 16)
    assert [node.attributes.get_int("local_window_size", -1) for node in attention(model)] == [16, -1]


def test_every_layer_rotates_by_the_table_of_the_windows(tmp_path: Path) -> None:
    own = {"num_hidden_layers": 6, "head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32}
    model = graph_of(tmp_path, "gemma3_text", **own)
    windowed = (True,) * 5 + (False,)
    assert {node.inputs[7].name for node in attention(model)} == {"model.rotary_emb_local.cos_cache"}
    corrections.rotate_by_layer(model, windowed, Rope(1e6, "linear", 8.0), 5000.0)
    for node, local in zip(attention(model), windowed, strict=True):
        cos, sin = (value.const_value.numpy() for value in node.inputs[7:9])
        wanted = rope_tables(5000.0 if local else 1e6, 1.0 if local else 8.0, 32, 128)
        assert np.array_equal(cos, wanted[0])
        assert np.array_equal(sin, wanted[1])


def test_the_factor_of_the_embedding_is_rounded(tmp_path: Path) -> None:
    model = graph_of(tmp_path, "gemma2", num_hidden_layers=1, head_dim=32)
    exact = np.float32(96**0.5)
    assert factor(model) != exact
    corrections.scale_embedding(model, 96**0.5)
    assert factor(model) == exact


def factor(model: ir.Model) -> np.float32:
    """What the embedding is multiplied by."""
    (gather,) = [u.node for u in model.graph.initializers[corrections.EMBEDDING].uses() if u.node.op_type == "Gather"]
    (product,) = [use.node for use in gather.outputs[0].uses() if use.node.op_type == "Mul"]
    value = next(value for value in product.inputs if value is not gather.outputs[0])
    constant = value.const_value or ir.convenience.get_const_tensor(value)
    return np.float32(constant.numpy().item())


@pytest.mark.parametrize("scale", [0.1, 32**-0.5])
def test_the_factor_of_attention_is_what_is_asked_for(tmp_path: Path, scale: float) -> None:
    model = graph_of(tmp_path, "gemma2", num_hidden_layers=2, head_dim=32)
    corrections.scale_attention(model, scale)
    found = [np.float32(node.attributes.get_float("scale")) for node in attention(model)]
    assert found == [np.float32(scale)] * 2


def test_fused_queries_keys_and_values_are_cut_apart(tmp_path: Path) -> None:
    model = graph_of(tmp_path, "phi3", num_hidden_layers=1, sliding_window=None, pad_token_id=0)
    module = "model.layers.0.self_attn"
    assert f"{module}.qkv_proj.weight" not in model.graph.initializers
    corrections.fuse_qkv(model, 1)
    assert model.graph.initializers[f"{module}.qkv_proj.weight"].shape == (192, 96)
    assert not [name for name in model.graph.initializers if name.startswith(f"{module}.q_proj")]


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + index / 10 for index in range(8)],
    "long_factor": [2.0 + index for index in range(8)],
    "attention_factor": 1.25,
    "partial_rotary_factor": 0.5,
}


def test_a_stated_factor_on_cos_and_sin_is_lost(tmp_path: Path) -> None:
    rope = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128, "num_attention_heads": 3}
    model = graph_of(tmp_path, "phi3", **rope, num_key_value_heads=1, num_hidden_layers=1, pad_token_id=0)
    table = model.graph.initializers["model.rotary_emb.cos_cache"]
    assert table.const_value is not None
    assert table.const_value.numpy()[0, 0] == 1.0
    factors = tuple(LONGROPE["short_factor"])  # type: ignore[arg-type]
    corrections.rotate_by_factors(model, Rope(1e4, "longrope", short=factors, magnitude=1.25))
    wanted = rope_tables(1e4, factors, 16, 128, 1.25)
    (node,) = attention(model)
    for value, numbers in zip(node.inputs[7:9], wanted, strict=True):
        assert np.array_equal(value.const_value.numpy(), numbers)  # type: ignore[union-attr]


def test_neighbouring_pairs_are_not_rotated(tmp_path: Path) -> None:
    (node,) = attention(model := graph_of(tmp_path, "ernie4_5", num_hidden_layers=1, head_dim=32))
    assert node.attributes.get_int("rotary_interleaved", 0) == 0
    corrections.rotate_pairs(model)
    assert node.attributes["rotary_interleaved"].value == 1


def test_an_attribute_that_the_operator_does_not_have_is_written(tmp_path: Path) -> None:
    rope = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128, "num_attention_heads": 3}
    model = graph_of(tmp_path, "phi3", **rope, num_key_value_heads=1, num_hidden_layers=1, pad_token_id=0)
    (node,) = attention(model)
    assert node.attributes["rotary_embedding_dim"].value == 16
    corrections.rotate_in_part(model)
    assert "rotary_embedding_dim" not in node.attributes
