"""The lossy quantizations users compare with, made by llama.cpp's own ggml_quantize_chunk.

llama_model_quantize itself is not in the xllamacpp wheel, but the function it calls for every tensor is. Which tensor
gets which type is the rule of src/llama-quant.cpp (llama_tensor_get_type, tensor_type_fallback) for a dense Llama. An
importance matrix is what llama-imatrix collects: the mean square of every in-feature of a matrix.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.formats.gguf.tensor_table import TensorPlan
from qalora_export.models.families import family_of
from qalora_export.quantization.presets import more_bits
from tests.formats.gguf.f32_twin import f32_plans

T = GGMLQuantizationType
FILE_TYPES = {"Q4_0": 2, "Q4_K_M": 15}  # enum llama_ftype
ROWS = 512
SUPER_BLOCK = 256
INSTEAD = {T.Q4_K: T.Q5_0, T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0}  # where 256 does not divide the in-features
Imatrix = Mapping[str, NDArray[np.float32]]  # GGUF name -> (in,)


def type_of(name: str, layers: int, recipe: str, *, columns: int = SUPER_BLOCK, tied: bool = False) -> T:
    """The type llama-quantize gives a matrix of a dense Llama. tied: the embedding is the output matrix."""
    kind = {"Q4_0": T.Q4_0, "Q4_K_M": T.Q4_K}[recipe]
    more = name.endswith(("attn_v.weight", "ffn_down.weight")) and recipe == "Q4_K_M"
    head = name == "output.weight" or (tied and name == "token_embd.weight")
    if head or (more and more_bits(int(name.split(".")[1]), layers)):
        kind = T.Q6_K
    return INSTEAD.get(kind, kind) if columns % SUPER_BLOCK else kind


def quantize_gguf(library: Path, checkpoint: Path, exact: Path, out: Path, recipe: str) -> Path:
    """`out`: the model of `checkpoint` requantized; metadata is that of `exact`, its Q4_1 export."""
    model = CanonicalCheckpoint(checkpoint)
    return quantize_plans(library, f32_plans(model), model.config, exact, out, recipe)


def quantize_plans(
    library: Path,
    plans: Sequence[TensorPlan],
    config: Mapping[str, Any],
    exact: Path,
    out: Path,
    recipe: str,
    imatrix: Imatrix | None = None,
) -> Path:
    """`out`: float32 tensors quantized; each matrix is handed to llama.cpp a block of rows at a time.

    exact: a GGUF file of the same model, whose metadata is taken. imatrix: importance of in-features by GGUF name.
    """
    c = ctypes.CDLL(str(library))
    c.ggml_quantize_chunk.restype = c_size_t
    c.ggml_quantize_chunk.argtypes = (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, ctypes.POINTER(c_float))
    layers = config["num_hidden_layers"]
    writer = GGUFWriter(out, family_of(config).gguf_arch)
    _copy_metadata(GGUFReader(exact), writer, FILE_TYPES[recipe])
    tied = not any(plan.name == "output.weight" for plan in plans)
    types = {
        p.name: type_of(p.name, layers, recipe, columns=p.shape[1], tied=tied) if len(p.shape) == 2 else T.F32
        for p in plans
    }
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
            importance = None if imatrix is None else imatrix.get(p.name)
            values = np.concatenate([_quantized(c, types[p.name], block, importance) for block in blocks])
        writer.write_tensor_data(values)
    writer.close()
    return out


def _quantized(c: ctypes.CDLL, kind: T, values: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    values = np.ascontiguousarray(values, np.float32)
    out = np.empty((values.shape[0], _row_bytes(kind, values.shape[1])), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    pointer = None if weights is None else weights.ctypes.data_as(ctypes.POINTER(c_float))
    written = c.ggml_quantize_chunk(int(kind), values.ctypes.data, out.ctypes.data, 0, *values.shape, pointer)
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
