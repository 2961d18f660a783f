"""Tiny GGUF and ONNX artifacts made without the product's exporters, so that runner tests stand on their own."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(source: Path, out: Path, *, changes: dict[str, np.ndarray] | None = None) -> Path:
    """All tensors of a tiny Llama in F32 with tokenizer and template; `changes` adds to tensors by HF module name."""
    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(str(out), "llama")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, source, config)
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        tensor = tensor.astype(np.float32) + (changes or {}).get(module, np.float32(0))
        if module in TOP:
            writer.add_tensor(f"{TOP[module]}.weight", tensor)
            continue
        _, _, layer, part = module.split(".", 3)
        rotated = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(part)
        if rotated:  # halves of each head interleave for llama.cpp's RoPE
            tensor = np.ascontiguousarray(tensor.reshape(rotated, 2, -1, tensor.shape[1]).swapaxes(1, 2)).reshape(
                tensor.shape
            )
        writer.add_tensor(f"blk.{layer}.{BLOCK[part]}.weight", tensor)
    _finish(writer)
    return out


def write_lora(out: Path, *, layer: int, a: np.ndarray, b: np.ndarray) -> Path:
    """A llama.cpp adapter for v_proj of one layer: a float32 (r, in), b float32 (out, r); alpha = r, so scale 1."""
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(len(a)))
    writer.add_tensor(f"blk.{layer}.attn_v.weight.lora_a", a)
    writer.add_tensor(f"blk.{layer}.attn_v.weight.lora_b", b)
    _finish(writer)
    return out


def write_onnx(source: Path, out: Path) -> Path:
    """The float32 graph of mobius with weights, and what GenAI needs beside it."""
    import mobius
    from mobius.integrations.ort_genai import write_ort_genai_config

    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        package = mobius.build(str(source), execution_provider="cpu", dtype="f32", load_weights=True)
        package.save(str(out))
    write_ort_genai_config(package, str(out), local_config_dir=str(source))
    return out


def _add_tokenizer(writer: gguf.GGUFWriter, source: Path, config: dict) -> None:
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    vocabulary = tokenizer["model"]["vocab"] | added
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in added else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(True)
    writer.add_chat_template((source / "chat_template.jinja").read_text())


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
