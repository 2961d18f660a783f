"""Gemma 2 and Gemma 3 (text): norms that multiply by 1 + w, before and after each block; windows; soft caps.

Every second layer (Gemma 2) or five of six (Gemma 3, with a RoPE base of their own) attend within a sliding window.
llama.cpp knows which layers those are, and the factor of q·k, from the sizes alone: other choices are refused.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from qalora_export.errors import InputError
from qalora_export.models.families.decoder import (
    ATTENTION_OUTPUT,
    DOWN,
    GATE,
    HEADS,
    KEY,
    KEY_NORM,
    LAYER,
    LINEARS,
    NORM_AFTER_ATTENTION,
    NORM_AFTER_MLP,
    NORM_BEFORE_ATTENTION,
    PRODUCT,
    QUERY,
    QUERY_NORM,
    UP,
    VALUE,
)
from qalora_export.models.families.family import Config, Family, GgufField, LayerPoint, from_config, head_dim
from qalora_export.models.families.rope import local_theta

NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
HEAD_NORMS = tuple(replace(point, heads_first=True) for point in (QUERY_NORM, KEY_NORM))
GEGLU = replace(PRODUCT, node="ffn_geglu")
TAIL = (
    HEADS,
    ATTENTION_OUTPUT,
    NORM_AFTER_ATTENTION,
    LayerPoint("pre_feedforward_layernorm", "input", "", "residual sum after attention", "sa_out"),
    LayerPoint(
        "pre_feedforward_layernorm",
        "output",
        "pre_feedforward_layernorm",
        "norm before the MLP: its weight or epsilon",
        "ffn_norm",
    ),
    GATE,
    UP,
    GEGLU,
    DOWN,
    NORM_AFTER_MLP,
    LAYER,
)


def _windowed(period: int) -> Callable[[Config], tuple[bool, ...]]:
    """One layer of `period` sees everything."""
    return lambda config: tuple((index + 1) % period != 0 for index in range(config["num_hidden_layers"]))


def _checked(period: int, biggest: int, caps: tuple[str, ...]) -> Callable[[Config], None]:
    """biggest: layers of the 27B model, whose factor of q·k is its own. caps: soft caps that llama.cpp always has."""

    def check(config: Config) -> None:
        for key in ("head_dim", "num_key_value_heads", "query_pre_attn_scalar", "sliding_window", *caps):
            value = config.get(key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise _refused(config, key, "it must be a positive number: the libraries' defaults are not the same")
        if config["num_hidden_layers"] < period:
            raise _refused(config, "num_hidden_layers", f"one layer of {period} sees everything, and there must be one")
        layers = ["sliding_attention" if windowed else "full_attention" for windowed in _windowed(period)(config)]
        whole_width = config["hidden_size"] // config["num_attention_heads"]
        for key, expected in (
            ("layer_types", layers),
            ("sliding_window_pattern", period),
            ("query_pre_attn_scalar", whole_width if len(layers) == biggest else head_dim(config)),
        ):
            if config.get(key) not in (None, expected):
                raise _refused(config, key, "llama.cpp derives it from the sizes, whatever the file says")

    return check


def _check3(config: Config) -> None:
    """Transformers takes a RoPE base of 1,000,000 where config.json has none, other libraries 10,000."""
    tables = config.get("rope_parameters")
    full = tables.get("full_attention") if isinstance(tables, Mapping) else None
    stated = full if isinstance(full, Mapping) else config
    if stated.get("rope_theta") is None:
        raise _refused(config, "rope_theta", "it must be stated: the libraries' defaults are not the same")
    local_theta(config)
    _checked(6, 62, ())(config)


def _refused(config: Config, key: str, why: str) -> InputError:
    return InputError(
        f"Gemma with {key} = {str(config.get(key))[:80]} is not supported",
        where=f"config.json: {key}",
        why=why,
        fix="use a model of the standard architecture",
    )


def _scale(config: Config) -> float:
    return 1.0 / math.sqrt(config["query_pre_attn_scalar"])


def _embedding_scale(config: Config) -> float:
    return math.sqrt(config["hidden_size"])


GEMMA2 = Family(
    name="Gemma 2",
    architectures=("Gemma2ForCausalLM",),
    gguf_arch="gemma2",
    rope_permuted={},
    rope_types=("default",),
    only={
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "tie_word_embeddings": (True,),  # llama.cpp's gemma2 has no other head
        "use_bidirectional_attention": (False, None),
    },
    linears=LINEARS,
    norms=NORMS,
    points=(NORM_BEFORE_ATTENTION, QUERY, KEY, VALUE, *TAIL),
    stated=("num_key_value_heads", "head_dim"),
    embedding_node="inp_scaled",
    gguf_fields=(
        GgufField("attention.sliding_window", "uint32", from_config("sliding_window")),
        GgufField("attn_logit_softcapping", "float32", from_config("attn_logit_softcapping")),
        GgufField("final_logit_softcapping", "float32", from_config("final_logit_softcapping")),
    ),
    norm_shift=1.0,
    tied=True,
    check=_checked(2, 46, CAPS),
    attention_scale=_scale,
    windowed=_windowed(2),
    embedding_scale=_embedding_scale,
)
GEMMA3 = Family(
    name="Gemma 3",
    architectures=("Gemma3ForCausalLM",),
    wrappers=("Gemma3ForConditionalGeneration",),
    gguf_arch="gemma3",
    rope_permuted={},
    rope_types=("default", "linear"),
    only={
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "attn_logit_softcapping": (None,),
        "use_bidirectional_attention": (False, None),
    },
    linears=LINEARS,
    norms=(*NORMS, "self_attn.q_norm", "self_attn.k_norm"),
    points=(NORM_BEFORE_ATTENTION, *HEAD_NORMS, VALUE, *TAIL),
    stated=("num_key_value_heads", "head_dim", "rope_theta"),
    embedding_node="inp_scaled",
    gguf_fields=(
        GgufField("attention.sliding_window", "uint32", from_config("sliding_window")),
        GgufField("final_logit_softcapping", "float32", from_config("final_logit_softcapping")),
        GgufField("rope.freq_base_swa", "float32", local_theta),
    ),
    norm_shift=1.0,
    tied=True,
    check=_check3,
    attention_scale=_scale,
    windowed=_windowed(6),
    local_theta=local_theta,
    embedding_scale=_embedding_scale,
)
