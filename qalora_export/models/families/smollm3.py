"""SmolLM3: a Llama in which every fourth layer has no rotary embedding (arXiv 2501.18795)."""

from qalora_export.errors import InputError
from qalora_export.models.families.decoder import LINEARS, NORMS, PAIRED_ROWS, POINTS
from qalora_export.models.families.family import Config, Family

NOPE_EVERY = 4  # llama.cpp's smollm3 has this number in its code (n_no_rope_layer_step)


def _check(config: Config) -> None:
    """Raise InputError when other layers than llama.cpp's go without RoPE."""
    layers = config["num_hidden_layers"]
    usual = [int((index + 1) % NOPE_EVERY != 0) for index in range(layers)]
    if list(config.get("no_rope_layers") or usual) != usual:
        raise InputError(
            "SmolLM3 with other layers without RoPE than every fourth",
            where="config.json: no_rope_layers",
            why="llama.cpp leaves RoPE out of every fourth layer, whatever the file says",
            fix="use a model of the standard architecture",
        )


SMOLLM3 = Family(
    name="SmolLM3",
    architectures=("SmolLM3ForCausalLM",),
    gguf_arch="smollm3",
    rope_permuted=PAIRED_ROWS,
    rope_types=("default", "linear", "llama3"),
    only={
        "hidden_act": ("silu",),
        "use_sliding_window": (False,),
        "attention_bias": (False,),
        "mlp_bias": (False,),
    },
    linears=LINEARS,
    norms=NORMS,
    points=POINTS,
    stated=("num_key_value_heads", "rope_theta"),
    tied=True,
    check=_check,
)
