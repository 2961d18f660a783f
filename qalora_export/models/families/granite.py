"""IBM Granite 3 (dense): a Llama with four multipliers, on embeddings, attention scores, residual branches, logits."""

from qalora_export.models.families.decoder import LINEARS, NORMS, PAIRED_ROWS, POINTS
from qalora_export.models.families.family import Family, GgufField, from_config

GRANITE = Family(
    name="Granite",
    architectures=("GraniteForCausalLM",),
    gguf_arch="granite",
    rope_permuted=PAIRED_ROWS,
    rope_types=("default", "linear", "llama3"),
    only={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
    linears=LINEARS,
    norms=NORMS,
    points=POINTS,
    attention_scale=lambda config: float(config["attention_multiplier"]),
    gguf_fields=(
        GgufField("attention.scale", "float32", from_config("attention_multiplier")),
        GgufField("embedding_scale", "float32", from_config("embedding_multiplier")),
        GgufField("residual_scale", "float32", from_config("residual_multiplier")),
        GgufField("logit_scale", "float32", from_config("logits_scaling")),
    ),
)
