"""Mistral 7B v0.2 and later, Mistral-Nemo, Mistral-Small: a Llama with its own head size and no sliding window.

llama.cpp knows them as `llama`. Mistral 7B v0.1 attends within a window of 4096, which llama.cpp's `llama` does not
do: it is refused.
"""

from qalora_export.models.families.decoder import LINEARS, NORMS, PAIRED_ROWS, POINTS
from qalora_export.models.families.family import Family

MISTRAL = Family(
    name="Mistral",
    architectures=("MistralForCausalLM",),
    gguf_arch="llama",
    rope_permuted=PAIRED_ROWS,
    rope_types=("default", "linear", "llama3"),
    only={"hidden_act": ("silu",), "sliding_window": (None,)},
    linears=LINEARS,
    norms=NORMS,
    points=POINTS,
)
