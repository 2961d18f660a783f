"""Llama 1–3 and everything that ships the same architecture (TinyLlama, Vicuna, SmolLM, …)."""

from qalora_export.models.families.family import Family

LLAMA = Family(
    name="Llama",
    architectures=("LlamaForCausalLM",),
    gguf_arch="llama",
    rope_permuted={"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"},
    rope_types=("default", "linear", "llama3"),
    only={
        "hidden_act": ("silu",),
        "partial_rotary_factor": (1.0, 1, None),
        "sliding_window": (None,),
        "pretraining_tp": (1, None, 2, 4, 8),  # how the training cluster split a matrix; the function is the same
    },
    linears=(
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ),
    norms=("input_layernorm", "post_attention_layernorm"),
)
