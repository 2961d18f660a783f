"""Only what both exporters carry exactly is admitted; everything else is refused with the list of what is."""

import numpy as np
import pytest

from qalora_export.errors import InputError
from qalora_export.models.families import family_of, rope_of, supported_architectures

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500000.0,
}


def test_llama_is_admitted_and_names_its_permuted_modules() -> None:
    family = family_of(LLAMA)
    assert family.gguf_arch == "llama"
    heads = {
        leaf: family.permuted_heads(f"model.layers.0.self_attn.{leaf}", LLAMA)
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    assert heads == {"q_proj": 4, "k_proj": 2, "v_proj": None, "o_proj": None}


def test_multi_head_attention_falls_back_to_the_head_count() -> None:
    config = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert family_of(config).permuted_heads("x.k_proj", config) == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
        ({"architectures": None}, "none named"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "key/value"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "divide"),
        ({"head_dim": 15}, "odd"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_parameters": [1]}, "table"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_unsupported_variants_are_refused(change: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        family_of(LLAMA | change)


def test_refusal_lists_what_is_supported() -> None:
    with pytest.raises(InputError) as caught:
        family_of({"architectures": ["Nope"]})
    assert all(name in str(caught.value) for name in supported_architectures())


def test_transformers_4_spelling_means_the_same() -> None:
    old = {"rope_theta": 500000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}
    assert rope_of(old) == rope_of({"rope_parameters": LLAMA3})
    assert rope_of({}).theta == 10000.0


def test_llama3_frequency_factors_agree_with_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=LLAMA3, max_position_embeddings=512)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, None)
    plain = 1.0 / (500000.0 ** (np.arange(0, 16, 2) / 16))
    factors = rope_of({"rope_parameters": LLAMA3}).frequency_factors(16)
    assert factors is not None
    assert factors.dtype == np.float32
    np.testing.assert_allclose(plain / factors, scaled.numpy(), rtol=1e-6)
    assert len(set(factors.tolist())) > 2  # unscaled, blended and fully scaled frequencies all occur
    assert rope_of({}).frequency_factors(16) is None
