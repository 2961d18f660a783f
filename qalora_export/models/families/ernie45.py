"""ERNIE 4.5 (dense): a Llama in which Transformers, like llama.cpp, rotates neighbouring pairs of features."""

from qalora_export.models.families.decoder import LINEARS, NORMS, POINTS
from qalora_export.models.families.family import Family

ERNIE45 = Family(
    name="ERNIE 4.5",
    architectures=("Ernie4_5ForCausalLM",),
    gguf_arch="ernie4_5",
    rope_permuted={},
    rotates_pairs=True,
    rope_types=("default",),
    only={"hidden_act": ("silu",), "use_bias": (False,)},
    linears=LINEARS,
    norms=NORMS,
    points=POINTS,
    stated=("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta"),
    tied=True,
)
