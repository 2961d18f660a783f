"""config.json and sampling defaults from GGUF metadata: the inverse of metadata.py.

Nothing is guessed: the metadata that our own exporter would write for the rebuilt config is compared with the file's,
and a key of the architecture that it would not write, or would write otherwise, is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import InputError
from qalora_export.formats.gguf.metadata import architecture
from qalora_export.formats.gguf.read import GgufContents
from qalora_export.formats.gguf.tensor_table import ROPE_FREQUENCIES, ROPE_LONG, ROPE_SHORT
from qalora_export.models.families import FAMILIES, Family
from qalora_export.models.families.family import head_dim
from qalora_export.models.families.rope import rope_of

WINDOW = "attention.sliding_window"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
# Keys our exporter never writes, with the values that mean the same as their absence; None: any value does.
NEUTRAL: dict[str, tuple[Any, ...] | None] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.finetuned": None,  # a remark about training
    "rope.scaling.original_context_length": None,  # llama.cpp reads it for YaRN only, which we refuse by its type
    "tensor_data_layout": None,  # a remark about the converter's source
}
SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
SAMPLING |= {"penalty_repeat": "repetition_penalty"}
# What llama 3's scaling is made of; GGUF holds only the divisors that follow from it.
ORIGINAL_CONTEXTS = tuple(2**power for power in range(7, 21))
HIGH_FREQUENCIES = (2.0, 4.0, 8.0, 16.0, 32.0)
FACTOR_TOLERANCE = 1e-6  # converters compute the divisors in float32, we in float64


def config_from_gguf(contents: GgufContents, model_type: str | None = None) -> dict[str, Any]:
    """config.json of the model in a GGUF file, in the spelling of Transformers 4, which 5 reads too.

    Token ids are not in it: the tokenizer decides them. model_type: Transformers' name of the architecture. Raises
    InputError for metadata that is missing, that a config.json of this family cannot express, or that our exporter
    would not write back alike.
    """
    family = gguf_family(contents)
    if family.norm_shift:
        raise _unknown(contents, family, "its norms are stored as 1 + w, which is not always exact to undo")
    read = _Reader(contents, family.gguf_arch)
    if EMBEDDING not in contents.types:
        raise _unknown(contents, family, "the file has no embedding")
    rows = contents.shape(EMBEDDING)[0]
    config: dict[str, Any] = {"architectures": [family.architectures[0]]}
    config |= {"model_type": model_type} if model_type else {}
    config |= {key: read.number(name) for name, key in SIZES.items()} | {"vocab_size": rows}
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = read.number("attention.head_count_kv", heads)
    config["head_dim"] = read.number("attention.key_length", config["hidden_size"] // heads)
    config["rms_norm_eps"] = read.real("attention.layer_norm_rms_epsilon")
    config["rope_theta"] = read.real("rope.freq_base", 10000.0)
    config["rope_scaling"] = _scaling(contents, config, read)
    if config["rope_scaling"] and config["rope_scaling"]["rope_type"] == "longrope":
        config["original_max_position_embeddings"] = config["rope_scaling"]["original_max_position_embeddings"]
        config["partial_rotary_factor"] = read.number("rope.dimension_count") / config["head_dim"]
    config |= {key: values[0] for key, values in family.only.items() if key == "hidden_act"}
    if not family.gguf_windows and (window := read.get(WINDOW)):  # the model's own, which llama.cpp ignores
        config["sliding_window"] = read.number(WINDOW, window)
    config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in contents.types
    config["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in contents.types
    config["tie_word_embeddings"] = HEAD not in contents.types
    config["dtype"] = "float32"
    _check(contents, family, config)
    return config


def sampling_from_gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """general.sampling.* as generation_config.json names it; empty when the file has none."""
    found = {
        key: _shortest(metadata[f"general.sampling.{name}"])
        for name, key in SAMPLING.items()
        if f"general.sampling.{name}" in metadata
    }
    if "temperature" in found:
        found["do_sample"] = found["temperature"] > 0
        if not found["do_sample"]:
            del found["temperature"]
    return found


def gguf_family(contents: GgufContents) -> Family:
    """The first family of this GGUF architecture. InputError when there is none."""
    arch = contents.metadata.get("general.architecture")
    for family in FAMILIES:
        if family.gguf_arch == arch:
            return family
    raise InputError(f"GGUF architecture {arch!r} is not supported", where=contents.path)


class _Reader:
    """Values of <arch>.* with their types checked."""

    def __init__(self, contents: GgufContents, arch: str) -> None:
        self._metadata, self._arch, self._path = contents.metadata, arch, contents.path

    def get(self, name: str) -> Any:
        return self._metadata.get(f"{self._arch}.{name}")

    def number(self, name: str, default: int | None = None) -> int:
        value = self.get(name)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 2**31:
            raise self._wrong(name, value)
        return value

    def real(self, name: str, default: float | None = None) -> float:
        value = self.get(name)
        value = default if value is None else value
        if not isinstance(value, float) or not 0 < value < float("inf"):
            raise self._wrong(name, value)
        return float(_shortest(value))

    def _wrong(self, name: str, value: object) -> InputError:
        what = "is missing" if value is None else f"is {str(value)[:80]!r}"
        return InputError(
            f"{self._arch}.{name} {what}",
            where=self._path,
            why="config.json cannot be rebuilt without one positive number there",
            fix="convert the model again with a current llama.cpp",
        )


def _shortest(value: Any) -> Any:
    """A float32 as the shortest decimal that rounds to it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _scaling(contents: GgufContents, config: Mapping[str, Any], read: _Reader) -> dict[str, Any] | None:
    factors = contents.rope_factors
    if ROPE_FREQUENCIES in factors:
        return _llama3(factors[ROPE_FREQUENCIES], config, contents.path)
    if ROPE_SHORT in factors and ROPE_LONG in factors:
        return {
            "rope_type": "longrope",
            "short_factor": [_shortest(float(value)) for value in factors[ROPE_SHORT]],
            "long_factor": [_shortest(float(value)) for value in factors[ROPE_LONG]],
            "attention_factor": read.real("rope.scaling.attn_factor", 1.0),
            "original_max_position_embeddings": read.number("rope.scaling.original_context_length"),
        }
    if read.get("rope.scaling.type") == "linear":
        return {"rope_type": "linear", "factor": read.real("rope.scaling.factor")}
    return None


def _llama3(factors: NDArray[np.float32], config: Mapping[str, Any], where: object) -> dict[str, Any]:
    """The llama 3 scaling whose divisors are these. Only ratios to low_freq_factor show, so that is taken as 1."""
    for candidate in _llama3_candidates(factors):
        expected = rope_of(dict(config) | {"rope_scaling": candidate}).frequency_factors(head_dim(config))
        if expected is None or expected.shape != factors.shape:
            continue
        if np.allclose(expected, factors, rtol=FACTOR_TOLERANCE, atol=0):
            return candidate
    raise InputError(
        "the rotary frequency factors are not those of llama 3's scaling",
        where=f"{where}: rope_freqs.weight",
        why="config.json can express that scaling only",
        fix="start from the original model",
    )


def _llama3_candidates(factors: NDArray[np.float32]) -> Iterator[dict[str, Any]]:
    largest = _shortest(float(factors.max()))
    for context in ORIGINAL_CONTEXTS:
        for high in HIGH_FREQUENCIES:
            yield {
                "rope_type": "llama3",
                "factor": largest,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": context,
            }


def _check(contents: GgufContents, family: Family, config: Mapping[str, Any]) -> None:
    """Refuse what the rebuilt config does not say: every key of the architecture must come out of it again."""
    prefix = f"{family.gguf_arch}."
    try:
        entries = architecture(family, config)
    except KeyError as error:
        raise _unknown(contents, family, f"it needs {error}") from error
    ours = {entry.key.removeprefix(prefix): entry.value for entry in entries}
    stored = {key.removeprefix(prefix): v for key, v in contents.metadata.items() if key.startswith(prefix)}
    for key, value in stored.items():
        neutral = NEUTRAL.get(key, ())
        if key in SIZES or (key == WINDOW and not family.gguf_windows):  # taken as it is
            continue
        if neutral is None or value in neutral or (key in ours and _same(ours[key], value)):
            continue
        raise InputError(
            f"{prefix}{key} = {str(value)[:80]} has no place in a {family.name} model",
            where=contents.path,
            why=f"its config would say {ours[key]!r}" if key in ours else "its config has no such setting",
            fix="start from the original model, if its architecture is supported",
        )


def _unknown(contents: GgufContents, family: Family, why: str) -> InputError:
    return InputError(
        f"config.json of a {family.name} model cannot be rebuilt from GGUF",
        where=contents.path,
        why=why,
        fix="start from the original model",
    )


def _same(ours: Any, stored: Any) -> bool:
    if isinstance(stored, float):
        return bool(np.float32(ours) == np.float32(stored))
    return bool(ours == stored)
