"""ONNX Runtime GenAI on the same ONNX folder: its own loop and tokenizer, steered by genai_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.differences import ABSENT
from qalora_export.checkpoint.generation import Generation, generation_config
from qalora_export.checkpoint.manifest import has_manifest, read_manifest
from qalora_export.errors import InputError
from qalora_export.formats.onnx.hosts import search_settings
from qalora_export.formats.onnx.layout import GENAI_CONFIG
from qalora_export.models.families import family_of
from qalora_export.safety import inside, read_json
from qalora_export.verify.runtimes.facts import expected_graph_facts
from qalora_export.verify.runtimes.onnxruntime import OnnxRuntime
from qalora_export.verify.runtimes.record import Facts, TextHabits, register

# Settings of GenAI's search that Transformers lacks or that are never asked for, with the values that switch them off.
UNUSED_SEARCH: Mapping[str, Any] = MappingProxyType(
    {"min_length": 0, "num_beams": 1, "num_return_sequences": 1, "no_repeat_ngram_size": 0, "batch_size": 1}
)
# Fact -> key of genai_config.json, in `model` or in `model.decoder`.
GENAI_SIZES = {
    "vocabulary": "vocab_size",
    "hidden size": "hidden_size",
    "layers": "num_hidden_layers",
    "attention heads": "num_attention_heads",
    "context length": "context_length",
    "key/value heads": "num_key_value_heads",
    "head size": "head_size",
}


@register
class OnnxRuntimeGenai(OnnxRuntime):
    name = "onnxruntime-genai"
    habits = TextHabits(adds_specials=False, rewrites_tools=True, reads_as_genai=True, own_decoder=True)
    own_tokenizer = True

    def expected(self, checkpoint: CanonicalCheckpoint, frequencies: NDArray[Any]) -> Facts:
        facts = super().expected(checkpoint, frequencies)
        sizes = expected_graph_facts(checkpoint.config, frequencies, "onnx")
        config = {f"genai {name}": sizes[name] for name in GENAI_SIZES}
        ends = expected_generation_ends(checkpoint.path, checkpoint.config)
        return facts | config | {"genai BOS id": facts["BOS id"], "genai ends at": ends}

    def found(self, artifact: Path, contents: Any) -> Facts:
        return super().found(artifact, contents) | genai_facts(artifact)

    def text_differences_accepted(self, artifact: Path) -> bool:
        return has_manifest(artifact) and accepts_text_differences(read_manifest(artifact))

    def expected_defaults(self, generation: Generation, config: Mapping[str, Any]) -> dict[str, Any]:
        context = int(family_of(config).exported(config, "onnx")["max_position_embeddings"])
        return {**UNUSED_SEARCH, **search_settings(generation), "max_length": context}

    def lost_settings(self, generation: Generation) -> tuple[str, ...]:
        return (*generation.other, *(["min_p"] if generation.do_sample and generation.min_p else []))


def accepts_text_differences(manifest: Mapping[str, Any]) -> bool:
    """Whether the folder was exported with allow_text_differences."""
    settings = manifest.get("settings")
    return isinstance(settings, dict) and settings.get("allow_text_differences") is True


def genai_facts(folder: Path) -> dict[str, Any]:
    """Facts of genai_config.json, which ONNX Runtime GenAI trusts over the graph."""
    config = read_json(inside(folder, GENAI_CONFIG))
    model = config.get("model") if isinstance(config, dict) else None
    decoder = model.get("decoder") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(decoder, dict):
        raise InputError("no table model.decoder", where=folder / GENAI_CONFIG, why="GenAI reads the decoder from it")
    facts = {name: {**decoder, **model}.get(key, ABSENT) for name, key in GENAI_SIZES.items()}
    facts |= {"BOS id": model.get("bos_token_id"), "ends at": _as_list(model.get("eos_token_id"))}
    return {f"genai {name}": value for name, value in facts.items()}


def expected_generation_ends(checkpoint: Path, config: Mapping[str, Any]) -> list[int]:
    """End-of-generation ids as Transformers' generate sees them."""
    return _as_list(generation_config(checkpoint, config).get("eos_token_id", config.get("eos_token_id")))


def _as_list(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value or [])
