"""Phi-3, Phi-4 and Phi-4-mini: q, k, v in one matrix, gate and up in another.

A sliding window (Phi-3-mini and -medium 4k: 2047) is ignored by llama.cpp's phi3, so it is the context of a GGUF file.
RoPE scaled by length (longrope: the 128k models, Phi-4-mini) is exported for texts of the original context:
Transformers takes the factors for longer ones by the length of a text, llama.cpp by the size of its context.
"""

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
    check_window,
    window_everywhere,
)
from qalora_export.models.families.family import Config, Family, GgufField, LayerPoint, head_dim
from qalora_export.models.families.rope import rope_of

ROPE_TYPES = ("default", "longrope")

KV_CELLS = 256  # llama.cpp rounds contexts up to this many positions


def _check(config: Config) -> None:
    """Raise InputError for a window or rotary embeddings that the exporters would not carry exactly."""
    check_window(config)
    rope = rope_of(config, ROPE_TYPES)
    if rope.kind != "longrope":
        return
    if "original_max_position_embeddings" not in config:
        raise InputError(
            "Phi-3 with longrope and no original_max_position_embeddings",
            where="config.json",
            why="Transformers assumes 4096, whatever the rotary parameters say",
            fix="state it beside max_position_embeddings",
        )
    if rope.original_context % KV_CELLS:
        raise InputError(
            f"longrope with an original context of {rope.original_context} positions is not supported",
            where="config.json: original_max_position_embeddings",
            why=f"llama.cpp rounds a context up to {KV_CELLS} positions and would take the factors for longer texts",
            fix="use a model of the standard architecture",
        )
    if 2 * len(rope.short) != rope.rotated(head_dim(config)):
        raise InputError(
            f"longrope has {len(rope.short)} factors for {rope.rotated(head_dim(config))} rotated features",
            where="config.json: rope_scaling",
            why="each pair of features has one",
            fix="fetch the model again",
        )


def _original_context(config: Config) -> int:
    return rope_of(config, ROPE_TYPES).original_context or int(config["max_position_embeddings"])


PHI3 = Family(
    name="Phi-3",
    architectures=("Phi3ForCausalLM",),
    gguf_arch="phi3",
    rope_permuted={},
    rope_types=ROPE_TYPES,
    only={"hidden_act": ("silu",)},
    check=_check,
    windowed=window_everywhere,
    gguf_windows=False,
    partial_rotary=True,
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
    # llama.cpp's phi3 wants both keys and has no window whatever the first says.
    gguf_fields=(
        GgufField("attention.sliding_window", "uint32", lambda _: 0),
        GgufField("rope.scaling.original_context_length", "uint32", _original_context),
    ),
    fused_qkv=True,
    stated=("rms_norm_eps",),
)
