"""Mistral 7B, Mistral-Nemo, Mistral-Small: a Llama with its own head size and, in 7B v0.1, a sliding window.

llama.cpp knows them as `llama`, which has no window: a GGUF file of such a model has the window as its context.
"""

from qalora_export.models.families.decoder import (
    LINEARS,
    NORMS,
    PAIRED_ROWS,
    POINTS,
    check_window,
    window_everywhere,
)
from qalora_export.models.families.family import Family

MISTRAL = Family(
    name="Mistral",
    architectures=("MistralForCausalLM",),
    wrappers=("Mistral3ForConditionalGeneration",),
    gguf_arch="llama",
    rope_permuted=PAIRED_ROWS,
    rope_types=("default", "linear", "llama3"),
    only={"hidden_act": ("silu",)},
    check=lambda config: check_window(config, default=4096),
    windowed=window_everywhere,
    gguf_windows=False,
    linears=LINEARS,
    norms=NORMS,
    points=POINTS,
    stated=("num_key_value_heads",),
)
