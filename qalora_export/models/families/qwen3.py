"""Qwen3 (dense): a norm of every query and key head before RoPE, a head size of its own."""

from qalora_export.models.families.decoder import LINEARS, NORMS, POINTS_WITH_HEAD_NORMS
from qalora_export.models.families.family import Family

QWEN3 = Family(
    name="Qwen3",
    architectures=("Qwen3ForCausalLM",),
    gguf_arch="qwen3",
    rope_permuted={},
    rope_types=("default",),
    only={"hidden_act": ("silu",), "use_sliding_window": (False,), "attention_bias": (False,)},
    linears=LINEARS,
    norms=(*NORMS, "self_attn.q_norm", "self_attn.k_norm"),
    points=POINTS_WITH_HEAD_NORMS,
    stated=("num_key_value_heads", "head_dim"),
)
