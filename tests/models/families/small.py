"""A small random model of every admitted family, with what sets it apart: head norms, multipliers, NoPE layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qalora_export.models.families import family_of
from tests.models.families.tokenizers import save_tokenizer

SIZES: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.15,
}
WINDOWS = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64}  # shorter than the probe sequences
# RoPE with other factors beyond the original context, whose real forms have 4,096 of 131,072 positions.
LONGROPE: Mapping[str, Any] = {
    "max_position_embeddings": 1024,
    "original_max_position_embeddings": 256,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + index / 50 for index in range(16)],
        "long_factor": [1.5 + 2.0 * index for index in range(16)],
    },
}
PARTIAL = {  # three quarters of 64 features of a head are rotated
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_parameters": {
        **LONGROPE["rope_parameters"],
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0 + index / 50 for index in range(24)],
        "long_factor": [1.5 + 2.0 * index for index in range(24)],
    },
}
VARIANTS = {
    "Mistral, windows": "Mistral",
    "Phi-3, windows": "Phi-3",
    "Phi-3, longrope": "Phi-3",
    "Phi-4-mini": "Phi-3",
}
# Family or variant -> Transformers' model type, form of its real tokenizer, what its config says beside the sizes.
CONFIGS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "Llama": ("llama", "Llama 3", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "Mistral": ("mistral", "SentencePiece", {"head_dim": 48, "sliding_window": None}),
    "Qwen2": ("qwen2", "Qwen", {"tie_word_embeddings": True}),
    "Qwen3": ("qwen3", "Qwen", {"head_dim": 48, "tie_word_embeddings": True}),
    "SmolLM3": ("smollm3", "Llama 3", {"num_hidden_layers": 4}),
    "Granite": (
        "granite",
        "StarCoder",
        {"embedding_multiplier": 12.0, "attention_multiplier": 0.1, "residual_multiplier": 0.22, "logits_scaling": 0.5},
    ),
    "OLMo-2": ("olmo2", "cl100k", {}),
    "Gemma 2": ("gemma2", "Gemma", {"num_hidden_layers": 4, **WINDOWS}),
    "Gemma 3": ("gemma3_text", "Gemma", {"num_hidden_layers": 6, **WINDOWS}),
    "Phi-3": ("phi3", "SentencePiece", {"sliding_window": None}),
    "ERNIE 4.5": ("ernie4_5", "SentencePiece", {"head_dim": 48, "tie_word_embeddings": True}),
    # Variants of a family whose function is not the same in every runtime: an export has less context than the model.
    "Mistral, windows": ("mistral", "SentencePiece", {"sliding_window": 64}),
    "Phi-3, windows": ("phi3", "SentencePiece", {"sliding_window": 64}),
    "Phi-3, longrope": ("phi3", "SentencePiece", LONGROPE),
    "Phi-4-mini": ("phi3", "o200k", {**LONGROPE, "tie_word_embeddings": True, "sliding_window": 262144, **PARTIAL}),
}


def make_small(path: Path, family: str, **overrides: object) -> Path:
    """Random weights in fp16, norms around 1, biases that matter, a small tokenizer of the family's form."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, form, own = CONFIGS[family]
    tokens = save_tokenizer(form, path)
    config = AutoConfig.for_model(model_type, **{**SIZES, **own, **tokens, **overrides})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                shift = family_of(config.to_dict() | {"architectures": [type(model).__name__]}).norm_shift
                parameter.uniform_(0.5 - shift, 1.5 - shift)
            if name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    model.to(torch.float16).save_pretrained(path)
    return path
