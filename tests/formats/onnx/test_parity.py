"""Admission of the Llama family: the exported graph against Transformers in float32, at every position."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.canonical_writer import CanonicalWriter
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.formats.onnx.export import export_onnx
from qalora_export.models.loading import load_model
from qalora_export.recipe import OnnxSettings
from qalora_export.verify.runtimes.onnx_dequantize import runtime_dequantized
from tests.formats.onnx.helpers import decode, prefill, worst_nmse
from tests.models import make_tiny_canonical, make_tiny_model, round_to_nearest

# Float32 sums in another order: 2e-13 to 2e-11 here. A wrong epsilon, base or offset is above 1e-6.
BOUND = 1e-9
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Case:
    name: str
    model: dict[str, Any] = field(default_factory=dict)
    bits: int = 4
    group: int = 32
    sym: bool = False


CASES = (
    Case("multi-head", {"num_key_value_heads": 4}),
    Case("grouped-query, tied", {"tie_word_embeddings": True}),
    Case("one kv head, symmetric", {"num_key_value_heads": 1}, sym=True),
    Case("attention bias", {"attention_bias": True}, group=64),
    Case("2 bits, g 64", bits=2, group=64),
    Case("3 bits, g 32", bits=3),
    Case("3 bits, symmetric", bits=3, sym=True, group=128),
    Case("8 bits, g 128", bits=8, group=128),
    Case("bfloat16 source, tied", {"dtype": "bfloat16", "tie_word_embeddings": True}),
    Case("float32 source", {"dtype": "float32"}),
    Case("llama3 rotary scaling, wide heads", {"rope_parameters": LLAMA3, "head_dim": 64}),
    Case(
        "linear rotary scaling",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, "rms_norm_eps": 1e-3},
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_position_equals_transformers(case: Case, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model", **case.model)
    make_tiny_canonical(tmp_path / "base", tmp_path / "model", bits=case.bits, group=case.group, sym=case.sym)
    check_parity(tmp_path / "base", tmp_path / "onnx")


def test_mixed_bits_and_a_quantized_head(tmp_path: Path) -> None:
    """Per-module rules: q, k and v differ in bits and group size, one layer is skipped, a tied lm_head is quantized."""
    make_tiny_model(tmp_path / "model", tie_word_embeddings=True)
    folder = ModelFolder(tmp_path / "model")
    rules = {
        "q_proj": (8, 64),
        "k_proj": (3, 32),
        "v_proj": (2, 128),
        "o_proj": (4, 128),
        "gate_proj": (4, 32),
        "up_proj": (8, 32),
    }
    with CanonicalWriter(tmp_path / "base", folder.config | {"tie_word_embeddings": False}, kind="base") as writer:
        for name, tensor in folder.tensors():
            leaf = name.split(".")[-2]
            if leaf in rules:
                writer.add_quantized(name.removesuffix(".weight"), round_to_nearest(np.asarray(tensor), *rules[leaf]))
            else:
                writer.add(name, np.asarray(tensor))
        head = round_to_nearest(np.asarray(folder.tensor("model.embed_tokens.weight")), 8, 32, sym=True)
        writer.add_quantized("lm_head", head)
    check_parity(tmp_path / "base", tmp_path / "onnx")


def check_parity(checkpoint: Path, out: Path) -> None:
    """accuracy_level 1: prefill and decode within BOUND, dequantized weights to 0 ulp."""
    export_onnx(checkpoint, out, OnnxSettings(accuracy_level=1))
    source = CanonicalCheckpoint(checkpoint)
    ids = np.random.default_rng(0).integers(0, source.config["vocab_size"], (1, 40))
    with torch.no_grad():
        reference = load_model(checkpoint)(torch.from_numpy(ids)).logits.numpy()
    assert worst_nmse(prefill(out, ids), reference) <= BOUND
    assert worst_nmse(decode(out, ids), reference) <= BOUND
    for module, weight in runtime_dequantized(out, out.with_name("work")):
        assert np.array_equal(weight, source.group_affine(module).dequantize()), module
