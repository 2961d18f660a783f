"""Only what both exporters carry exactly is admitted; everything else is refused with the list of what is."""

from dataclasses import replace

import numpy as np
import pytest

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.models.families import FAMILIES, Family, family_of, rope_of, supported_architectures
from qalora_export.models.families.rope import rope_tables
from tests.conftest import ROOT
from tests.models.families.small import CONFIGS
from tests.models.families.support_table import table

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
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
        ({"num_hidden_layers": 2**30}, "1073741824 layers"),
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
    with pytest.raises((InputError, UnsafeInputError), match=said):
        family_of(LLAMA | change)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_what_transformers_assumes_otherwise_must_be_stated(family: Family) -> None:
    from transformers import AutoConfig

    sizes = {"hidden_size": 96, "num_attention_heads": 6}
    config = AutoConfig.for_model(CONFIGS[family.name][0], **sizes).to_dict()
    ours = {"num_key_value_heads": 6, "head_dim": 16, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
    theirs = config | {"head_dim": config.get("head_dim") or 16, "rope_theta": rope_of(config).theta}
    assert set(family.stated) == {key for key, value in ours.items() if theirs[key] != value}
    for key in family.stated:
        said = {name: value for name, value in (LLAMA | ours).items() if name not in (key, "rope_parameters")}
        with pytest.raises(InputError, match=f"does not say {key}"):
            replace(family, check=None, only={}).check_variant(said)


def test_refusal_lists_what_is_supported() -> None:
    with pytest.raises(InputError) as caught:
        family_of({"architectures": ["Nope"]})
    assert all(name in str(caught.value) for name in supported_architectures())


def test_the_readme_holds_the_table_of_families() -> None:
    assert table() in (ROOT / "README.md").read_text(encoding="utf-8")


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


GEMMA3 = LLAMA | {
    "architectures": ["Gemma3ForCausalLM"],
    "num_hidden_layers": 6,
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 32,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    },
}
GEMMA2 = GEMMA3 | {
    "architectures": ["Gemma2ForCausalLM"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}


def test_gemma_3_has_two_bases_in_both_spellings() -> None:
    old = {key: value for key, value in GEMMA3.items() if key != "rope_parameters"}
    old |= {"rope_theta": 1e6, "rope_local_base_freq": 5000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    for config in (GEMMA3, old):
        family = family_of(config)
        assert (rope_of(config).theta, rope_of(config).factor) == (1e6, 8.0)
        assert family.local_theta is not None
        assert family.local_theta(config) == 5000.0
        assert family.windowed(config) == (True,) * 5 + (False,)


@pytest.mark.parametrize(
    ("base", "change", "said"),
    [
        (GEMMA3, {"layer_types": ["full_attention"] * 6}, "layer_types"),
        (GEMMA3, {"sliding_window_pattern": 2}, "sliding_window_pattern"),
        (GEMMA3, {"query_pre_attn_scalar": 17}, "query_pre_attn_scalar"),
        (GEMMA3, {"query_pre_attn_scalar": None}, "query_pre_attn_scalar"),
        (GEMMA3, {"sliding_window": None}, "sliding_window"),
        (GEMMA3, {"head_dim": None}, "head_dim"),
        (GEMMA3, {"num_hidden_layers": 4}, "num_hidden_layers"),
        (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (GEMMA3, {"rope_parameters": None}, "rope_theta"),
        (GEMMA2, {"attn_logit_softcapping": None}, "attn_logit_softcapping"),
        (GEMMA2, {"final_logit_softcapping": 0.0}, "final_logit_softcapping"),
        (GEMMA2, {"tie_word_embeddings": False}, "tie_word_embeddings"),
        (GEMMA2, {"hidden_activation": "gelu"}, "hidden_activation"),
    ],
)
def test_gemma_is_refused_where_llama_cpp_would_compute_another_function(base: dict, change: dict, said: str) -> None:
    family_of(base)
    with pytest.raises(InputError, match=said):
        family_of(base | change)


def test_local_layers_that_scale_rope_are_refused() -> None:
    tables = GEMMA3["rope_parameters"] | {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}
    config = GEMMA3 | {"rope_parameters": tables}
    with pytest.raises(InputError, match="linear"):
        family_of(config)


def test_rope_tables_are_those_of_transformers() -> None:
    import torch

    cos, sin = rope_tables(1e6, 8.0, 16, 100)
    inverse = 1.0 / (1e6 ** (torch.arange(0, 16, 2, dtype=torch.int64).float() / 16)) / 8.0
    angles = torch.arange(100).float()[:, None] * inverse
    np.testing.assert_allclose(cos, angles.cos().numpy(), atol=1e-6)
    np.testing.assert_allclose(sin, angles.sin().numpy(), atol=1e-6)
    assert (cos.dtype, cos.shape) == (np.float32, (100, 8))
