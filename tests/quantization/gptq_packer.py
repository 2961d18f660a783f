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


def pack_zeros(zeros: np.ndarray, bits: int, stored: str) -> np.ndarray:
    """zeros (G, out) -> qzeros int32 (G, out·bits/32). stored: "gptq_v2" holds z; the others v1, z − 1, as written by

    gptq       GPTQModel: a subtraction from each word, which may borrow; at 3 bits modulo 8 per value
    autogptq   −1 is all ones over the rest of the word
    """
    if stored == "gptq_v2":
        return pack(zeros.T, bits).T.copy()
    if bits == 3:
        return pack((zeros.T - 1) % 8, bits).T.copy()
    words = np.zeros((zeros.shape[0], zeros.shape[1] * bits // 32), np.uint32)
    for row, column in np.ndindex(words.shape):
        word = 0
        for index, z in enumerate(zeros[row, column * 32 // bits : (column + 1) * 32 // bits]):
            moved = (int(z) - 1) << (bits * index)
            word = word | moved if stored == "autogptq" else word + moved
        words[row, column] = word % 2**32
    return words.view(np.int32)


def make_layer(random: np.random.Generator, out: int, width: int, *, bits: int, group: int, sym: bool) -> dict:
    """codes (in, out), zeros (G, out) and scales fp16 (G, out), as GPTQ orders them; codes lie around the zeros."""
    groups = width // group
    zeros = np.full((groups, out), 2 ** (bits - 1)) if sym else random.integers(0, 2**bits, (groups, out))
    g_idx = (np.arange(width) // group).astype(np.int32)
    reach = np.minimum(zeros, 2**bits - 1 - zeros)[g_idx]
    near, anywhere = zeros[g_idx] + random.integers(-reach, reach + 1), random.integers(0, 2**bits, (width, out))
    return {
        "codes": np.where(random.random((width, out)) < 0.2, anywhere, near),
        "zeros": zeros,
        "scales": random.uniform(0.001, 0.05, (groups, out)).astype(np.float16),
        "g_idx": g_idx,
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

    stored: see pack_zeros. config: overrides of the quantization config; None drops a key.
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
            f"{module}.qzeros": pack_zeros(layer["zeros"], bits, stored),
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
        "checkpoint_format": "gptq_v2" if stored == "gptq_v2" else "gptq",
        "meta": None if stored == "autogptq" else {"quantizer": ["gptqmodel:7.3.6"]},
    } | (config or {})
    full = json.loads((path / "config.json").read_text())
    full["quantization_config"] = {key: value for key, value in said.items() if value is not None}
    (path / "config.json").write_text(json.dumps(full))
    return layers
