"""Names come from llama.cpp's table, and no other architecture leaks into it."""

import pytest
from gguf import MODEL_ARCH, TensorNameMap

from qalora_export.errors import InputError
from qalora_export.formats.gguf.names import NameMap

LLAMA = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "model.layers.1.self_attn.q_proj.weight": "blk.1.attn_q.weight",
    "model.layers.1.self_attn.k_proj.bias": "blk.1.attn_k.bias",
    "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
    "model.layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
    "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
    "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
}


@pytest.mark.parametrize("polluted", [False, True])
def test_names_whatever_was_mapped_before(polluted: bool) -> None:
    if polluted:
        TensorNameMap(MODEL_ARCH.ARCTIC, 2)  # redefines post_attention_layernorm for the whole class
    names = NameMap("llama", 2)
    assert {name: names.to_gguf(name) for name in LLAMA} == LLAMA


def test_our_use_leaves_the_shared_table_alone() -> None:
    before = {key: tuple(value) for key, value in TensorNameMap.block_mappings_cfg.items()}
    NameMap("arctic", 1)
    assert {key: tuple(value) for key, value in TensorNameMap.block_mappings_cfg.items()} == before


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="no name"):
        NameMap("llama", 1).to_gguf("model.layers.1.self_attn.q_proj.weight")
    with pytest.raises(InputError, match="architecture"):
        NameMap("nonsense", 1)
