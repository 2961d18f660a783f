"""The decoder layer that most families share: pre-norm, rotary attention with grouped key/value heads, gated MLP."""

from qalora_export.errors import InputError
from qalora_export.models.families.family import Config, LayerPoint

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LINEARS = (*ATTENTION, *MLP)
NORMS = ("input_layernorm", "post_attention_layernorm")
# Heads whose rows llama.cpp keeps in the order of neighbouring pairs.
PAIRED_ROWS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}

NORM_BEFORE_ATTENTION = LayerPoint(
    "input_layernorm", "output", "input_layernorm", "norm before attention: its weight or epsilon", "attn_norm"
)
QUERY = LayerPoint("self_attn.q_proj", "output", "self_attn.q_proj", "query projection", "Qcur")
KEY = LayerPoint("self_attn.k_proj", "output", "self_attn.k_proj", "key projection", "Kcur")
VALUE = LayerPoint("self_attn.v_proj", "output", "self_attn.v_proj", "value projection", "Vcur")
QUERY_NORM = LayerPoint(
    "self_attn.q_norm", "output", "self_attn.q_norm", "norm of the queries: its weight or epsilon", "Qcur_normed"
)
KEY_NORM = LayerPoint(
    "self_attn.k_norm", "output", "self_attn.k_norm", "norm of the keys: its weight or epsilon", "Kcur_normed"
)
HEADS = LayerPoint(
    "self_attn.o_proj", "input", "self_attn", "attention over the heads: RoPE, mask, scale or KV cache", "kqv_out"
)
ATTENTION_OUTPUT = LayerPoint(
    "self_attn.o_proj", "output", "self_attn.o_proj", "output projection of attention", "attn_out"
)
SUM_AFTER_ATTENTION = LayerPoint("post_attention_layernorm", "input", "", "residual sum after attention", "ffn_inp")
NORM_BEFORE_MLP = LayerPoint(
    "post_attention_layernorm",
    "output",
    "post_attention_layernorm",
    "norm before the MLP: its weight or epsilon",
    "ffn_norm",
)
GATE = LayerPoint("mlp.gate_proj", "output", "mlp.gate_proj", "gate projection", "ffn_gate")
UP = LayerPoint("mlp.up_proj", "output", "mlp.up_proj", "up projection", "ffn_up")
PRODUCT = LayerPoint("mlp.down_proj", "input", "mlp", "activation function times up projection", "ffn_swiglu")
DOWN = LayerPoint("mlp.down_proj", "output", "mlp.down_proj", "down projection", "ffn_out")
# Behind attention and MLP instead of, or beside, before them (OLMo 2, Gemma).
NORM_AFTER_ATTENTION = LayerPoint(
    "post_attention_layernorm",
    "output",
    "post_attention_layernorm",
    "norm after attention: its weight or epsilon",
    "attn_post_norm",
)
NORM_AFTER_MLP = LayerPoint(
    "post_feedforward_layernorm",
    "output",
    "post_feedforward_layernorm",
    "norm after the MLP: its weight or epsilon",
    "ffn_post_norm",
)
LAYER = LayerPoint("", "output", "", "residual sum after the MLP", "l_out")

POINTS = (
    NORM_BEFORE_ATTENTION,
    QUERY,
    KEY,
    VALUE,
    HEADS,
    ATTENTION_OUTPUT,
    SUM_AFTER_ATTENTION,
    NORM_BEFORE_MLP,
    GATE,
    UP,
    PRODUCT,
    DOWN,
    LAYER,
)
# With a norm of every query and key head before RoPE (Qwen3): the projections have no name of their own in llama.cpp.
POINTS_WITH_HEAD_NORMS = tuple(
    point for shared in POINTS for point in {QUERY: (QUERY_NORM,), KEY: (KEY_NORM,)}.get(shared, (shared,))
)


def window_everywhere(config: Config) -> tuple[bool, ...]:
    """Every layer attends within `sliding_window` (Mistral, Phi-3), where that is shorter than the context."""
    window = config.get("sliding_window")
    shorter = window is not None and window < config["max_position_embeddings"]
    return (True,) * config["num_hidden_layers"] if shorter else ()


def check_window(config: Config, default: int | None = None) -> None:
    """Raise InputError for a `sliding_window` that is no number of positions, or that Transformers would assume.

    default: what Transformers takes where the key is absent.
    """
    window = config.get("sliding_window", default)
    if window is not None and (type(window) is not int or window <= 0 or "sliding_window" not in config):
        absent = "sliding_window" not in config
        raise InputError(
            "config.json does not say whether there is a sliding window" if absent else f"sliding_window is {window!r}",
            where="config.json: sliding_window",
            why=f"Transformers assumes {default}, other libraries none" if absent else "it must be a positive number",
            fix="state it: null for none" if absent else "fetch the model again",
        )
