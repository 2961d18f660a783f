"""Qwen 1.5, Qwen 2 and Qwen 2.5 (dense): biases on q, k and v; llama.cpp rotates halves as Transformers does."""

from qalora_export.models.families.decoder import LINEARS, NORMS, POINTS
from qalora_export.models.families.family import Family

QWEN2 = Family(
    name="Qwen2",
    architectures=("Qwen2ForCausalLM",),
    gguf_arch="qwen2",
    rope_permuted={},
    rope_types=("default",),
    only={"hidden_act": ("silu",), "use_sliding_window": (False,)},
    linears=LINEARS,
    norms=NORMS,
    points=POINTS,
    stated=("num_key_value_heads",),
)
