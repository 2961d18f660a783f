"""GGUF files as other tools write them: no metadata of ours, any tensor type the gguf package can make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize

# byte offsets of the fp16 numbers in a block
K_QUANTS = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}


def rewritten(
    exact: Path, out: Path, kind_of: Callable[[str], str], metadata: dict[str, Any] | None = None, drop: str = ""
) -> Path:
    """The model of `exact`, a file of our exporter, with every matrix in the type kind_of(name).

    metadata: entries to add or replace. drop: a tensor to leave out.
    """
    reader = GGUFReader(exact)
    writer = GGUFWriter(out, reader.fields["general.architecture"].contents())
    given = dict(metadata or {})
    for field in reader.fields.values():
        if field.name.startswith(("GGUF.", "qalora.")) or field.name == "general.architecture":
            continue
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, given.pop(field.name, field.contents()), field.types[0], inner)
    for key, value in given.items():
        writer.add_key_value(key, value, GGUFValueType.get_type(value))
    for tensor in reader.tensors:
        if tensor.name == drop:
            continue
        values = dequantize(tensor.data, tensor.tensor_type)
        kind = kind_of(tensor.name) if values.ndim == 2 else "F32"
        data = k_quant(kind, values) if kind in K_QUANTS else quantize(values, T[kind])
        writer.add_tensor(tensor.name, data, raw_dtype=T[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def k_quant(kind: str, values: np.ndarray) -> np.ndarray:
    """Blocks of random codes with small scales: numbers of that type, though not those of `values`."""
    elements, size = GGML_QUANT_SIZES[T[kind]]
    blocks = np.random.default_rng(0).integers(0, 256, (values.size // elements, size), np.uint8)
    for offset in K_QUANTS[kind]:
        blocks[:, offset : offset + 2] = np.full((len(blocks), 1), 1e-4, np.float16).view(np.uint8)
    return blocks.reshape(values.shape[0], -1)


def values_in_file(path: Path) -> dict[str, np.ndarray]:
    """GGUF name -> float32 values, by the gguf package alone, q and k back in Transformers' row order."""
    reader = GGUFReader(path)
    heads = {
        leaf: int(reader.fields[f"llama.attention.{key}"].contents())
        for leaf, key in (("attn_q.", "head_count"), ("attn_k.", "head_count_kv"))
    }
    found = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        for leaf, count in heads.items():
            if f".{leaf}" in tensor.name:  # llama.cpp: reshape(heads, 2, half).swapaxes(1, 2); this is its inverse
                rest = values.shape[1:]
                values = (
                    values.reshape(count, values.shape[0] // count // 2, 2, *rest).swapaxes(1, 2).reshape(-1, *rest)
                )
        found[tensor.name] = values
    return found
