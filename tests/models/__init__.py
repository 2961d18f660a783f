"""Tiny models for tests: random Llama weights, a real byte-level BPE tokenizer, made in about a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qalora_export.checkpoint.canonical_writer import CanonicalWriter
from qalora_export.checkpoint.manifest import parent_of
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.grid import GroupAffine

TEXT = (
    "The export keeps every code, scale and offset. Turn on the kitchen lights at 7:30, please! "
    "def forward(x, w): return x @ w.T  # 1234567890 naïve café — 東京 🙂\n"
) * 50


def make_tiny_model(path: Path, *, seed: int = 0, dtype: str = "float16", **overrides: object) -> Path:
    """A random Llama in Transformers format. Overrides go to LlamaConfig (tie_word_embeddings, attention_bias, …)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from samples.base.tokenizer import train_tokenizer

    tokenizer = train_tokenizer([TEXT], vocab_size=512)
    config = LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-5,
            "initializer_range": 0.15,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        | overrides
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            if name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def round_to_nearest(weight: np.ndarray, bits: int, group: int, *, sym: bool = False) -> GroupAffine:
    """Plain RTN, only to give tests a realistic matrix; the product's own is in qalora_export.quantization."""
    out, columns = weight.shape
    groups = weight.astype(np.float32).reshape(out, columns // group, group)
    low, high = groups.min(-1), groups.max(-1)
    if sym:
        top = np.maximum(abs(low), abs(high))
        scale = (top / 2 ** (bits - 1)).astype(np.float16)
        offset = (-(2.0 ** (bits - 1)) * scale.astype(np.float32)).astype(np.float16)
    else:
        scale, offset = ((high - low) / (2**bits - 1)).astype(np.float16), low.astype(np.float16)
    scale = np.where(scale == 0, np.float16(1e-4), scale)
    codes = np.rint((groups - offset.astype(np.float32)[..., None]) / scale.astype(np.float32)[..., None])
    return GroupAffine(codes.clip(0, 2**bits - 1).astype(np.uint8).reshape(out, columns), scale, offset, bits)


def make_tiny_canonical(path: Path, source: Path, *, bits: int = 4, group: int = 32, sym: bool = False) -> Path:
    """Every `*_proj` of `source` in canonical form by RTN; the rest bit for bit."""
    folder = ModelFolder(source)
    with CanonicalWriter(
        path, folder.config, folder.companions(), kind="base", parents=[parent_of(source, "source")]
    ) as out:
        for name, tensor in folder.tensors():
            if name.endswith("_proj.weight"):
                out.add_quantized(
                    name.removesuffix(".weight"), round_to_nearest(np.asarray(tensor), bits, group, sym=sym)
                )
            else:
                out.add(name, np.asarray(tensor))
    return path
