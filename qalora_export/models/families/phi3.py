"""Phi-3-mini with its 4k context, Phi-3-medium 4k, Phi-4 (14B): q, k, v in one matrix, gate and up in another.

The 128k models and Phi-4-mini scale RoPE by length (longrope), which llama.cpp decides once per context and
Transformers once per sequence: refused.
"""

from qalora_export.models.families.decoder import (
    ATTENTION_OUTPUT,
    DOWN,
    HEADS,
    LAYER,
    NORM_BEFORE_ATTENTION,
    NORM_BEFORE_MLP,
    NORMS,
    PRODUCT,
    SUM_AFTER_ATTENTION,
)
from qalora_export.models.families.family import Family, GgufField, LayerPoint

PHI3 = Family(
    name="Phi-3",
    architectures=("Phi3ForCausalLM",),
    gguf_arch="phi3",
    rope_permuted={},
    rope_types=("default",),
    only={"hidden_act": ("silu",), "partial_rotary_factor": (1.0, 1, None), "sliding_window": (None,)},
    linears=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    norms=NORMS,
    points=(
        NORM_BEFORE_ATTENTION,
        LayerPoint("self_attn.qkv_proj", "output", "self_attn.qkv_proj", "projection of q, k and v", "wqkv"),
        HEADS,
        ATTENTION_OUTPUT,
        SUM_AFTER_ATTENTION,
        NORM_BEFORE_MLP,
        LayerPoint("mlp.gate_up_proj", "output", "mlp.gate_up_proj", "gate and up projection", "ffn_up"),
        PRODUCT,
        DOWN,
        LAYER,
    ),
    # llama.cpp's phi3 has no window whatever the file says, so a model with one is refused.
    gguf_fields=(
        GgufField("attention.sliding_window", "uint32", lambda _: 0),
        GgufField("rope.scaling.original_context_length", "uint32", lambda config: config["max_position_embeddings"]),
    ),
    fused_qkv=True,
)
