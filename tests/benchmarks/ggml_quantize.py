"""The lossy quantizations users compare with, made by llama.cpp's own ggml_quantize_chunk.

llama_model_quantize itself is not in the xllamacpp wheel, but the function it calls for every tensor is. Which tensor
gets which type is llama.cpp's rule (src/llama-quant.cpp, llama_tensor_get_type) for a dense Llama without imatrix.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.models.families import family_of
from tests.formats.gguf.f32_twin import f32_plans

T = GGMLQuantizationType
FILE_TYPES = {"Q4_0": 2, "Q4_K_M": 15}  # enum llama_ftype
ROWS = 512


def more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's use_more_bits: the first and last eighth and every third layer between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def type_of(name: str, layers: int, recipe: str) -> T:
    """The type llama-quantize gives a matrix of a dense Llama."""
    plain = {"Q4_0": T.Q4_0, "Q4_K_M": T.Q4_K}[recipe]
    if name == "output.weight":
        return T.Q6_K
    if recipe == "Q4_K_M" and name.endswith(("attn_v.weight", "ffn_down.weight")):
        return T.Q6_K if more_bits(int(name.split(".")[1]), layers) else plain
    return plain


def quantize_gguf(library: Path, checkpoint: Path, exact: Path, out: Path, recipe: str) -> Path:
    """`out`: the model of `checkpoint` requantized; metadata is that of `exact`, its Q4_1 export.

    Each matrix is dequantized from the checkpoint and handed to llama.cpp a block of rows at a time.
    """
    c = ctypes.CDLL(str(library))
    c.ggml_quantize_chunk.restype = c_size_t
    c.ggml_quantize_chunk.argtypes = (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, ctypes.POINTER(c_float))
    model = CanonicalCheckpoint(checkpoint)
    layers = model.config["num_hidden_layers"]
    writer = GGUFWriter(out, family_of(model.config).gguf_arch)
    _copy_metadata(GGUFReader(exact), writer, FILE_TYPES[recipe])
    plans = f32_plans(model)
    types = {p.name: type_of(p.name, layers, recipe) if len(p.shape) == 2 else T.F32 for p in plans}
    sizes = {p.name: _row_bytes(types[p.name], p.shape[-1]) * (p.shape[0] if len(p.shape) == 2 else 1) for p in plans}
    for p in plans:
        shape = (p.shape[0], sizes[p.name] // p.shape[0]) if len(p.shape) == 2 else p.shape
        dtype = np.dtype(np.uint8) if len(p.shape) == 2 else np.dtype(np.float32)
        writer.add_tensor_info(p.name, shape, dtype, sizes[p.name], types[p.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for p in plans:
        values = p.load(slice(None))
        if len(p.shape) == 2:
            blocks = [values[at : at + ROWS] for at in range(0, p.shape[0], ROWS)]
            values = np.concatenate([_quantized(c, types[p.name], block) for block in blocks])
        writer.write_tensor_data(values)
    writer.close()
    return out


def _quantized(c: ctypes.CDLL, kind: T, values: np.ndarray) -> np.ndarray:
    values = np.ascontiguousarray(values, np.float32)
    out = np.empty((values.shape[0], _row_bytes(kind, values.shape[1])), np.uint8)
    written = c.ggml_quantize_chunk(int(kind), values.ctypes.data, out.ctypes.data, 0, *values.shape, None)
    if written != out.nbytes:
        raise RuntimeError(f"llama.cpp wrote {written} bytes of {kind.name}, expected {out.nbytes}")
    return out


def _row_bytes(kind: T, columns: int) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return columns // block * size


def _copy_metadata(reader: GGUFReader, writer: GGUFWriter, file_type: int) -> None:
    for field in reader.fields.values():
        if field.name.startswith(("GGUF.", "qalora.")) or field.name == "general.architecture":
            continue
        value = file_type if field.name == "general.file_type" else field.contents()
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, field.types[0], inner)
