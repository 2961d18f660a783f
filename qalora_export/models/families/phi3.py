"""Phi-4 (14B) and Phi-3 models without a window: q, k, v in one matrix, gate and up in another.

Refused: a sliding window (Phi-3-mini and -medium 4k: 2047), which llama.cpp's phi3 ignores, and RoPE scaled by length
(longrope: Phi-3 128k, Phi-4-mini), which llama.cpp decides once per context and Transformers once per sequence.
"""

from collections.abc import Mapping

from qalora_export.errors import InputError
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
from qalora_export.models.families.family import Config, Family, GgufField, LayerPoint

LONG = ("longrope", "su", "yarn")  # the names that Phi-3's configs have had for it


def _check(config: Config) -> None:
    """Raise InputError for rotary embeddings that both exporters would not carry exactly."""
    raw = config.get("rope_scaling") or config.get("rope_parameters")
    kind = raw.get("rope_type", raw.get("type")) if isinstance(raw, Mapping) else None
    if kind in LONG:
        raise InputError(
            f"Phi-3 with RoPE that is scaled by length ({kind}) is not supported",
            where="config.json: rope_scaling",
            why="llama.cpp takes the long factors by the size of its context, Transformers by the length of each text",
            fix="use Phi-4 (14B), or another family",
        )
    for key, allowed, why in (
        ("partial_rotary_factor", (None, 1.0), "both exporters rotate whole heads"),
        ("sliding_window", (None,), "llama.cpp's phi3 has no window, whatever the file says"),
    ):
        if config.get(key) not in allowed:
            raise InputError(
                f"Phi-3 with {key} = {config[key]!r} is not supported", where=f"config.json: {key}", why=why
            )


PHI3 = Family(
    name="Phi-3",
    architectures=("Phi3ForCausalLM",),
    gguf_arch="phi3",
    rope_permuted={},
    rope_types=("default",),
    only={"hidden_act": ("silu",)},
    check=_check,
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
