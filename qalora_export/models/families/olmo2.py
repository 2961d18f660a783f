"""OLMo 2: norms after attention and MLP instead of before, and over all query and key features at once."""

from qalora_export.models.families.decoder import (
    ATTENTION_OUTPUT,
    DOWN,
    GATE,
    HEADS,
    KEY_NORM,
    LAYER,
    LINEARS,
    NORM_AFTER_ATTENTION,
    NORM_AFTER_MLP,
    PRODUCT,
    QUERY_NORM,
    UP,
    VALUE,
)
from qalora_export.models.families.family import Family

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
        NORM_AFTER_ATTENTION,
        GATE,
        UP,
        PRODUCT,
        DOWN,
        NORM_AFTER_MLP,
        LAYER,
    ),
    stated=("rms_norm_eps",),
)
