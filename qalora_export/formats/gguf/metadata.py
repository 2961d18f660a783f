"""GGUF key/value metadata of an architecture: what llama.cpp needs to build the graph.

Keys follow docs/gguf.md of ggml. A list of typed entries rather than calls, so it can be compared and tested.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qalora_export.checkpoint.generation import Generation
from qalora_export.models.families import Family, rope_of
from qalora_export.models.families.family import head_dim

# llama.cpp's own order has the temperature last; Transformers cuts the distribution that the temperature gives.
SAMPLERS = "penalties;temperature;top_k;top_p;min_p"
QUANTIZATION_VERSION = 2  # ggml's GGML_QNT_VERSION: the block layouts that types.py writes


@dataclass(frozen=True, slots=True)
class Entry:
    """One metadata entry; kind is the name of GGUFWriter's add_* method without the prefix."""

    key: str
    kind: str
    value: Any


def general(*, name: str, file_type: int) -> list[Entry]:
    """general.* (general.architecture is the writer's own). file_type: that of the prevailing tensor type."""
    return [
        Entry("general.type", "string", "model"),
        Entry("general.name", "string", name),
        Entry("general.file_type", "uint32", file_type),
        Entry("general.quantization_version", "uint32", QUANTIZATION_VERSION),
    ]


def architecture(family: Family, config: Mapping[str, Any]) -> list[Entry]:
    """<arch>.*: sizes, heads, normalization, rotary embedding. config: the checkpoint's config.json."""
    config = family.exported(config, "gguf")
    heads = config["num_attention_heads"]
    size, rope = head_dim(config), rope_of(config, family.rope_types)
    fields: list[tuple[str, str, Any]] = [
        ("vocab_size", "uint32", config["vocab_size"]),
        ("context_length", "uint32", config["max_position_embeddings"]),
        ("embedding_length", "uint32", config["hidden_size"]),
        ("block_count", "uint32", config["num_hidden_layers"]),
        ("feed_forward_length", "uint32", config["intermediate_size"]),
        ("attention.head_count", "uint32", heads),
        ("attention.head_count_kv", "uint32", config.get("num_key_value_heads") or heads),
        ("attention.key_length", "uint32", size),
        ("attention.value_length", "uint32", size),
        ("attention.layer_norm_rms_epsilon", "float32", config.get("rms_norm_eps", 1e-6)),
        ("rope.dimension_count", "uint32", rope.rotated(size)),
        ("rope.freq_base", "float32", rope.theta),
    ]
    if rope.kind == "linear":
        fields += [("rope.scaling.type", "string", "linear"), ("rope.scaling.factor", "float32", rope.factor)]
    if rope.kind == "longrope":
        fields += [("rope.scaling.attn_factor", "float32", rope.magnitude)]
    fields += [(own.key, own.kind, own.value(config)) for own in family.gguf_fields if own.value(config) is not None]
    return [Entry(f"{family.gguf_arch}.{key}", kind, value) for key, kind, value in fields]


def sampling(generation: Generation) -> list[Entry]:
    """general.sampling.*: defaults that llama.cpp takes in place of its own, which draw at random (temperature 0.8)."""
    fields: list[tuple[str, str, Any]] = [("temp", "float32", 0.0)]
    if generation.do_sample:
        fields = [
            ("sequence", "string", SAMPLERS),
            ("temp", "float32", generation.temperature),
            ("top_k", "int32", generation.top_k),
            ("top_p", "float32", generation.top_p),
            ("min_p", "float32", generation.min_p),
        ]
    if generation.repetition_penalty != 1:  # over the whole context, as Transformers applies it
        fields += [("penalty_repeat", "float32", generation.repetition_penalty), ("penalty_last_n", "int32", -1)]
    return [Entry(f"general.sampling.{key}", kind, value) for key, kind, value in fields]
