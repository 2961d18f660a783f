"""Writes checkpoints in GPTQ format with Python integers as bit strings: independent of the reader under test."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """(n, columns) -> int32 (n·bits/32, columns): a column is one string of bits, low bit of the first value first."""
    n, columns = values.shape
    words = np.zeros((n * bits // 32, columns), np.uint32)
    for column in range(columns):
        string = sum(int(value) << (bits * index) for index, value in enumerate(values[:, column]))
        for word in range(len(words)):
            words[word, column] = (string >> (32 * word)) & 0xFFFFFFFF
    return words.view(np.int32)


def make_layer(random: np.random.Generator, out: int, width: int, *, bits: int, group: int, sym: bool) -> dict:
    """codes (in, out), zeros (G, out) and scales fp16 (G, out), as GPTQ orders them."""
    groups = width // group
    zeros = np.full((groups, out), 2 ** (bits - 1)) if sym else random.integers(1, 2**bits, (groups, out))
    return {
        "codes": random.integers(0, 2**bits, (width, out)),
        "zeros": zeros,
        "scales": random.uniform(0.001, 0.05, (groups, out)).astype(np.float16),
        "g_idx": (np.arange(width) // group).astype(np.int32),
    }


def values(layer: dict) -> np.ndarray:
    """s·(q − z), float64 (out, in), by the definition."""
    g_idx = layer["g_idx"]
    return (layer["scales"].astype(np.float64)[g_idx] * (layer["codes"] - layer["zeros"][g_idx])).T


def make_gptq_folder(
    path: Path,
    source: Path,
    *,
    bits: int = 4,
    group: int = 32,
    sym: bool = True,
    stored: str = "gptq",
    config: dict | None = None,
    seed: int = 0,
) -> dict[str, dict]:
    """Replace every *_proj of `source` by a random layer in GPTQ format; returns the layers by module name.

    stored: "gptq" writes z − 1, "gptq_v2" writes z. config: overrides of the quantization config; None drops a key.
    """
    random = np.random.default_rng(seed)
    path.mkdir()
    for file in source.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tensors, layers = load_file(source / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        module, (out, width) = name.removesuffix(".weight"), tensors.pop(name).shape
        layer = make_layer(random, out, width, bits=bits, group=width if group == -1 else group, sym=sym)
        layers[module] = layer
        tensors |= {
            f"{module}.qweight": pack(layer["codes"], bits),
            f"{module}.qzeros": pack((layer["zeros"] - (stored == "gptq")).T, bits).T.copy(),
            f"{module}.scales": layer["scales"],
            f"{module}.g_idx": layer["g_idx"],
        }
    save_file(tensors, path / "model.safetensors")
    said = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": False,
        "sym": sym,
        "checkpoint_format": stored,
    } | (config or {})
    full = json.loads((path / "config.json").read_text())
    full["quantization_config"] = {key: value for key, value in said.items() if value is not None}
    (path / "config.json").write_text(json.dumps(full))
    return layers
