"""Settings in the artifact that are not the source's, each with how to try it in Transformers.

GGUF: keys <arch>.* (ggml's docs/gguf.md, llama.cpp's src/llama-arch.cpp), a key that is not there having the meaning
llama.cpp gives to its absence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.differences import ABSENT
from qalora_export.formats.gguf.metadata import architecture
from qalora_export.models.families import family_of
from qalora_export.models.families.family import head_dim
from qalora_export.verify.runtimes.facts import theta_frequencies, windows
from qalora_export.verify.runtimes.llama_cpp import rotation

# <arch>.KEY -> key of config.json that does the same in Transformers.
SETTINGS = {
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attention.scale": "attention_multiplier",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
ROTARY = ("rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.dimension_count")
# Written by converters and read by nothing that computes, or meaning the same as absence.
IDLE = ("vocab_size", "context_length", "rope.scaling.original_context_length", "rope.scaling.finetuned")
FREQUENCY_TOLERANCE = 1e-6
SHOWN = 4


@dataclass(frozen=True)
class Difference:
    """A setting. name: its key in the artifact. config: what to change in the source's config to have the artifact's;
    frequencies: radians per position that rotate instead, (head size / 2,). Without either it cannot be tried.
    """

    name: str
    expected: Any
    found: Any
    config: dict[str, Any] = field(default_factory=dict)
    frequencies: NDArray[np.float64] | None = None

    @property
    def said(self) -> str:
        return f"{self.name} is {_short(self.found)}, the model's is {_short(self.expected)}"

    @property
    def can_be_tried(self) -> bool:
        return bool(self.config) or self.frequencies is not None


def gguf_differences(
    metadata: Mapping[str, Any],
    config: Mapping[str, Any],
    divisors: NDArray[np.float32] | None,
    frequencies: NDArray[np.floating[Any]],
) -> list[Difference]:
    """config: the source's, complete. divisors: of rope_freqs.weight; frequencies: by which Transformers rotates."""
    family = family_of(config)
    prefix = f"{family.gguf_arch}."
    expected = {entry.key.removeprefix(prefix): entry.value for entry in architecture(family, config)}
    found = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    absent = _of_absence(config)
    differences = []
    for key in {**expected, **found}:
        if key in IDLE or key in ROTARY:
            continue
        wanted, got = expected.get(key, absent.get(key)), found.get(key, absent.get(key))
        if key not in expected and key not in SETTINGS:
            continue
        if not _same(wanted, got):
            change = {SETTINGS[key]: got} if key in SETTINGS and _usable(got) else {}
            differences.append(Difference(f"{prefix}{key}", wanted, got, change))
    context, window = found.get("context_length"), config.get("sliding_window")
    ends_within = isinstance(context, int) and isinstance(window, int) and context <= window
    if windows(family, config) and not found.get("attention.sliding_window") and not ends_within:
        unlimited = {"sliding_window": config["max_position_embeddings"]}
        name = f"{prefix}attention.sliding_window"
        differences.append(Difference(name, window, None, unlimited))
    if (rotary := _rotary(prefix, found, expected, divisors, frequencies)) is not None:
        differences.append(rotary)
    return differences


def _of_absence(config: Mapping[str, Any]) -> dict[str, Any]:
    """What llama.cpp takes where a key is not there."""
    heads, width = config["num_attention_heads"], config["hidden_size"] // config["num_attention_heads"]
    return {
        "attention.head_count_kv": heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.scale": 0.0,
        "attention.sliding_window": 0,
        "embedding_scale": 0.0,
        "residual_scale": 0.0,
        "logit_scale": 0.0,
    }


def _rotary(
    prefix: str,
    found: Mapping[str, Any],
    expected: Mapping[str, Any],
    divisors: NDArray[np.float32] | None,
    frequencies: NDArray[np.floating[Any]],
) -> Difference | None:
    """What llama.cpp rotates by, where it is not what Transformers rotates by."""
    base, size = found.get("rope.freq_base", 10000.0), found.get("rope.dimension_count", 2 * len(frequencies))
    if not isinstance(base, float) or base <= 0 or size != 2 * len(frequencies):
        return Difference(f"{prefix}rope.dimension_count", 2 * len(frequencies), size)
    kind, factor = found.get("rope.scaling.type", ABSENT), found.get("rope.scaling.factor", 0.0)
    own = rotation(base, size, kind, factor)
    if kind not in ("none", "linear", ABSENT) and factor not in (0.0, 1.0):
        return Difference(f"{prefix}rope.scaling.type", expected.get("rope.scaling.type", "none"), kind)
    if divisors is not None:
        own = own / np.asarray(divisors, np.float64)
    if own.shape == frequencies.shape and np.allclose(own, frequencies, rtol=FREQUENCY_TOLERANCE, atol=0):
        return None
    for key in ("rope.freq_base", "rope.scaling.type", "rope.scaling.factor"):
        neutral = {"rope.freq_base": 10000.0, "rope.scaling.type": "none", "rope.scaling.factor": 0.0}[key]
        wanted, got = expected.get(key, neutral), found.get(key, neutral)
        if not _same(wanted, got):
            return Difference(f"{prefix}{key}", wanted, got, frequencies=own)
    what = "the file has none" if divisors is None else f"divisors {np.asarray(divisors)[-SHOWN:].tolist()} at the end"
    wanted = (theta_frequencies(base, size) / frequencies)[-SHOWN:]
    return Difference("rope_freqs.weight", f"divisors {np.round(wanted, 4).tolist()} at the end", what, frequencies=own)


def complete_config(folder: Any) -> dict[str, Any]:
    """config.json with the defaults of its class, as Transformers reads it."""
    from transformers import AutoConfig

    loaded = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False).to_dict()
    config: dict[str, Any] = {key: value for key, value in loaded.items() if key != "quantization_config"}
    config["head_dim"] = head_dim(config)
    return config


def _usable(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value != 0


def _same(wanted: Any, got: Any) -> bool:
    if isinstance(wanted, float) or isinstance(got, float):
        numbers = isinstance(wanted, int | float) and isinstance(got, int | float)
        return numbers and bool(np.float32(wanted) == np.float32(got))
    return bool(wanted == got)


def _short(value: Any) -> str:
    return "absent" if value is None else f"{value:.6g}" if isinstance(value, float) else repr(value)[:80]
