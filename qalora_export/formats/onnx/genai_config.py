"""genai_config.json of a foreign folder: every key must be one that we know to be harmless.

ONNX Runtime GenAI acts on this file before it looks at the model: it loads the library that `custom_ops_library` names,
writes a profile where `enable_profiling` says, opens any model in `filename`, hands provider options to native code,
and passes every other key of `session_options` to ONNX Runtime as a configuration entry (some of which name files). So
this is an allowlist. Its keys are those our exporter writes and the plain ones of a decoder in the schema of
onnxruntime-genai (src/config.h, src/config.cpp).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from qalora_export.errors import UnsafeInputError
from qalora_export.formats.onnx.layout import GRAPHS

MOST = 2**31 - 1  # the runtime keeps its numbers in 32 bits

Check: TypeAlias = Callable[[Any], bool]
Schema: TypeAlias = Mapping[str, "Check | Schema"]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _count(value: Any) -> bool:
    return type(value) is int and -1 <= value <= MOST


def _number(value: Any) -> bool:
    return _count(value) or (type(value) is float and abs(value) <= MOST)


def _ids(value: Any) -> bool:
    return _count(value) or (isinstance(value, list) and len(value) <= 4096 and all(map(_count, value)))


def _nothing(value: Any) -> bool:
    return isinstance(value, list) and not value


def _model_file(value: Any) -> bool:
    return isinstance(value, str) and value in GRAPHS


SESSION: Schema = {
    "log_id": _text,
    "log_severity_level": _count,
    "log_verbosity_level": _count,
    "intra_op_num_threads": _count,
    "inter_op_num_threads": _count,
    "enable_cpu_mem_arena": _flag,
    "enable_mem_pattern": _flag,
    "graph_optimization_level": _text,
    "provider_options": _nothing,  # empty is the CPU
}
INPUTS: Schema = dict.fromkeys(
    (
        "input_ids",
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        "past_key_names",
        "past_value_names",
        "past_names",
        "past_sequence_length",
        "current_sequence_length",
        "total_sequence_length",
        "cache_indirection",
    ),
    _text,
)
OUTPUTS: Schema = dict.fromkeys(("logits", "present_key_names", "present_value_names", "present_names"), _text)
WINDOW: Schema = {
    "window_size": _count,
    "pad_value": _count,
    "alignment": _text,
    "slide_key_value_cache": _flag,
    "slide_inputs": _flag,
    "layers": _ids,
    "cache_slack": _count,
}
DECODER: Schema = {
    "filename": _model_file,
    "session_options": SESSION,
    "hidden_size": _count,
    "head_size": _count,
    "num_attention_heads": _count,
    "num_key_value_heads": _count,
    "num_hidden_layers": _count,
    "inputs": INPUTS,
    "outputs": OUTPUTS,
    "sliding_window": WINDOW,
}
SCHEMA: Schema = {
    "model": {
        "type": _text,
        "vocab_size": _count,
        "context_length": _count,
        "bos_token_id": _count,
        "eos_token_id": _ids,
        "pad_token_id": _count,
        "sep_token_id": _count,
        "decoder_start_token_id": _count,
        "decoder": DECODER,
        "prompt_templates": dict.fromkeys(("assistant", "prompt", "system", "user"), _text),
    },
    "search": {
        "do_sample": _flag,
        "early_stopping": _flag,
        "past_present_share_buffer": _flag,
        "min_length": _count,
        "max_length": _count,
        "batch_size": _count,
        "num_beams": _count,
        "num_return_sequences": _count,
        "no_repeat_ngram_size": _count,
        "top_k": _count,
        "random_seed": _count,
        "chunk_size": _count,
        "repetition_penalty": _number,
        "top_p": _number,
        "temperature": _number,
        "diversity_penalty": _number,
        "length_penalty": _number,
    },
}


def check_genai_config(config: object, where: Path) -> None:
    """Raise UnsafeInputError, naming the key, for every key and value that is not known to be harmless."""
    _check(config, SCHEMA, "", where)


def _check(value: object, schema: Check | Schema, key: str, where: Path) -> None:
    if callable(schema):
        if value is not None and not schema(value):
            raise UnsafeInputError(
                f"{key} is {str(value)[:80]!r}",
                where=where,
                why=f"it must be {GRAPHS[0]}, the file that was checked" if schema is _model_file else _WHY,
                fix=_FIX,
            )
        return
    if not isinstance(value, dict):
        raise UnsafeInputError(f"{key or 'the whole file'} is no table", where=where, fix=_FIX)
    for name, item in value.items():
        path = f"{key}.{name}" if key else str(name)
        if name not in schema:
            raise UnsafeInputError(f"{path} is not a key that we know to be harmless", where=where, why=_WHY, fix=_FIX)
        _check(item, schema[name], path, where)


_WHY = "the runtime could load code, or read or write other files, on its behalf"
_FIX = "remove it, or export the folder again"
