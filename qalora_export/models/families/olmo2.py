"""OLMo 2: norms after attention and MLP instead of before, and over all query and key features at once."""

from qalora_export.models.families.decoder import (
    ATTENTION_OUTPUT,
    DOWN,
    GATE,
    HEADS,
    KEY_NORM,
    LAYER,
    LINEARS,
    PRODUCT,
    QUERY_NORM,
    UP,
    VALUE,
)
from qalora_export.models.families.family import Family, LayerPoint

OLMO2 = Family(
    name="OLMo-2",
    architectures=("Olmo2ForCausalLM",),
    gguf_arch="olmo2",
    rope_permuted={},
    rope_types=("default",),
    only={"hidden_act": ("silu",), "attention_bias": (False,)},
    genai_type="olmo",
    linears=LINEARS,
    norms=("post_attention_layernorm", "post_feedforward_layernorm", "self_attn.q_norm", "self_attn.k_norm"),
    points=(
        QUERY_NORM,
        KEY_NORM,
        VALUE,
        HEADS,
        ATTENTION_OUTPUT,
        LayerPoint(
            "post_attention_layernorm",
            "output",
            "post_attention_layernorm",
            "norm after attention: its weight or epsilon",
            "attn_post_norm",
        ),
        GATE,
        UP,
        PRODUCT,
        DOWN,
        LayerPoint(
            "post_feedforward_layernorm",
            "output",
            "post_feedforward_layernorm",
            "norm after the MLP: its weight or epsilon",
            "ffn_post_norm",
        ),
        LAYER,
    ),
)
