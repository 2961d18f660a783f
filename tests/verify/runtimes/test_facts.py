"""The order of tokens is a fact of every kind of tokenizer: right files have it, and a changed score or rule shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qalora_export.formats.gguf.metadata import architecture
from qalora_export.formats.gguf.tokenizer.fields import tokenizer_entries
from qalora_export.formats.gguf.tokenizer.pretokenizer import NAMED
from qalora_export.models.families import family_of
from qalora_export.verify.runtimes.facts import (
    differing_facts,
    expected_graph_facts,
    expected_text_facts,
    long_rope_facts,
    theta_frequencies,
)
from qalora_export.verify.runtimes.llama_cpp import facts_of
from tests.formats.gguf.tokenizer.synthetic import byte_level, sentencepiece, unigram, with_bos, write_vocabulary

REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
WORDS = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "WhitespaceSplit"},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
    ],
}
ROWS = 1600
KINDS: dict[str, tuple[Callable[[], dict[str, Any]], str, str]] = {
    "bytes": (lambda: with_bos(byte_level(NAMED["qwen2"].splits), "<s>"), "merges", "merges"),
    "SentencePiece": (lambda: with_bos(sentencepiece(normalizer=REPLACE), "<s>"), "scores", "tokens by rank"),
    "unigram": (lambda: unigram() | {"pre_tokenizer": WORDS}, "scores", "scores"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_tokens_is_compared(kind: str, tmp_path: Path) -> None:
    make, key, fact = KINDS[kind]
    (tmp_path / "tokenizer.json").write_text(json.dumps(make()))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    )
    metadata = {entry.key: entry.value for entry in tokenizer_entries(tmp_path, {"vocab_size": ROWS})}
    expected = expected_text_facts(tmp_path)
    assert expected[fact]
    assert differing_facts(expected, _found(metadata, tmp_path)) == []

    changed = list(metadata[f"tokenizer.ggml.{key}"])
    at = next(at for at in range(300, len(changed)) if changed[at] != changed[at + 1])
    changed[at : at + 2] = changed[at + 1], changed[at]
    found = _found(metadata | {f"tokenizer.ggml.{key}": changed}, tmp_path)
    assert [line.split(":")[0] for line in differing_facts(expected, found)] == [fact]


def test_another_kind_of_tokenizer_in_the_file_is_a_difference(tmp_path: Path) -> None:
    assert differing_facts({"merges": ["a b"]}, _found({"tokenizer.ggml.model": "llama"}, tmp_path))


def _found(metadata: dict[str, Any], folder: Path) -> dict[str, Any]:
    arch = {"general.architecture": "llama"}
    return facts_of(folder / "none.gguf", arch | metadata)


GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    },
}


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({}, None),
        ({"gemma3.attention.sliding_window": 16}, "attention windows"),
        ({"gemma3.attention.sliding_window": None}, "attention windows"),
        ({"gemma3.attention.sliding_window_pattern": 2}, "attention windows"),
        ({"gemma3.rope.freq_base_swa": 1e4}, "RoPE frequencies in windows"),
        ({"gemma3.rope.freq_base_swa": None}, "RoPE frequencies in windows"),
        ({"gemma3.rope.freq_base": 2e6}, "RoPE frequencies"),
    ],
)
def test_windows_and_their_rope_are_compared(change: dict[str, Any], fact: str | None, tmp_path: Path) -> None:
    """A probe set seldom reaches beyond a window: logits would not show a lost one."""
    family, out = family_of(GEMMA3), tmp_path / "model.gguf"
    frequencies = theta_frequencies(1e6, 16)
    metadata = {entry.key: entry.value for entry in architecture(family, GEMMA3)} | change
    metadata = {"general.architecture": "gemma3"} | {key: value for key, value in metadata.items() if value is not None}
    write_vocabulary(out, [])
    expected = expected_graph_facts(GEMMA3, frequencies, "gguf")
    assert expected["attention windows"] == [32] * 5 + [0, 32]
    wrong = differing_facts(expected, facts_of(out, metadata))
    assert [line.split(":")[0] for line in wrong] == ([] if fact is None else [fact])


PHI3 = {
    "architectures": ["Phi3ForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "original_max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "sliding_window": None,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5] * 4, "long_factor": [2.0, 3.0] * 4},
}


@pytest.mark.parametrize(
    ("change", "tables", "fact"),
    [
        ({}, {}, None),
        ({}, {"rope_factors_short.weight": 1.25}, "RoPE frequencies"),
        ({}, {"rope_factors_long.weight": 1.25}, "RoPE frequencies in larger contexts"),
        ({"phi3.rope.scaling.attn_factor": None}, {}, "RoPE magnitude"),
        ({"phi3.rope.scaling.attn_factor": 1.2}, {}, "RoPE magnitude"),
        ({"phi3.rope.scaling.original_context_length": 128}, {}, "larger contexts begin after"),
        ({"phi3.context_length": 1024}, {}, "context length"),
    ],
)
def test_rope_that_is_scaled_by_length_is_compared(
    change: dict[str, Any], tables: dict[str, float], fact: str | None, tmp_path: Path
) -> None:
    """Probe sequences are shorter than the context that is exported: logits would not show the rest."""
    from gguf import GGUFWriter

    out = tmp_path / "model.gguf"
    metadata = {entry.key: entry.value for entry in architecture(family_of(PHI3), PHI3)} | change
    metadata = {"general.architecture": "phi3"} | {key: value for key, value in metadata.items() if value is not None}
    writer = GGUFWriter(out, "phi3")
    for name in ("short", "long"):
        factors = np.float32(PHI3["rope_scaling"][f"{name}_factor"]) * tables.get(f"rope_factors_{name}.weight", 1.0)
        writer.add_tensor(f"rope_factors_{name}.weight", factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    frequencies = theta_frequencies(1e4, 16) / np.array([1.0, 1.5] * 4)
    expected = expected_graph_facts(PHI3, frequencies, "gguf") | long_rope_facts(PHI3)
    wrong = differing_facts(expected, facts_of(out, metadata))
    assert [line.split(":")[0] for line in wrong] == ([] if fact is None else [fact])
