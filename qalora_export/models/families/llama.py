"""Llama 1–3 and everything that ships the same architecture (TinyLlama, Vicuna, SmolLM, …)."""

from qalora_export.models.families.decoder import LINEARS, NORMS, PAIRED_ROWS, POINTS
from qalora_export.models.families.family import Family

LLAMA = Family(
    name="Llama",
    architectures=("LlamaForCausalLM",),
    gguf_arch="llama",
    rope_permuted=PAIRED_ROWS,
    rope_types=("default", "linear", "llama3"),
    only={
        "hidden_act": ("silu",),
        "partial_rotary_factor": (1.0, 1, None),
        "sliding_window": (None,),
        "pretraining_tp": (1, None, 2, 4, 8),  # how the training cluster split a matrix; the function is the same
    },
    linears=LINEARS,
    norms=NORMS,
    points=POINTS,
)
