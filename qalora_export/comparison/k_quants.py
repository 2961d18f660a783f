"""llama.cpp's own quantizations of a model folder, made by its own ggml_quantize_chunk: what people deploy.

llama_model_quantize itself is not in the xllamacpp wheel, but the function it calls for every tensor is. Which tensor
gets which type is the rule of src/llama-quant.cpp (llama_tensor_get_type, tensor_type_fallback) for a dense model. An
importance matrix is what llama-imatrix collects: the mean square of every in-feature of a matrix.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from ctypes import c_float, c_int, c_int64, c_size_t, c_void_p
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from numpy.typing import NDArray
from qalora_runtimes.llama_cpp.wheel import import_wheel
from qalora_runtimes.scoring import MissingRuntimeError

from qalora_export.checkpoint.model_folder import ModelFolder, as_float32
from qalora_export.errors import RuntimeUnavailableError
from qalora_export.formats.gguf.file import GgufFile, StoredTensor
from qalora_export.formats.gguf.names import NameMap
from qalora_export.formats.gguf.permute import row_order
from qalora_export.formats.gguf.tensor_table import ROPE_FREQUENCIES, ROPE_LONG, ROPE_SHORT, TensorPlan, as_stored
from qalora_export.formats.gguf.types import F32
from qalora_export.models.families import family_of
from qalora_export.quantization.presets import more_bits
from qalora_export.safety import atomic_file

T = GGMLQuantizationType
SIXTEEN_BITS = "F16"
K_QUANTS = {4: "Q4_K_M", 3: "Q3_K_M", 2: "Q2_K"}
ROWS = 512
SUPER_BLOCK = 256
# Where 256 does not divide the in-features; F16 where 32 does not either.
INSTEAD = {T.Q2_K: T.IQ4_NL, T.Q3_K: T.IQ4_NL, T.Q4_K: T.Q5_0, T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0}
Imatrix = Mapping[str, NDArray[np.float32]]  # GGUF name -> (in,)


class Place(NamedTuple):
    """shared: query heads per key/value head."""

    layer: int
    layers: int
    shared: int


def _more(at: Place) -> T:
    return T.Q6_K if more_bits(at.layer, at.layers) else T.Q4_K


# File type (enum llama_ftype), type of matrices, and of those that get another.
RECIPES: Mapping[str, tuple[int, T, Mapping[str, T | Callable[[Place], T]]]] = {
    SIXTEEN_BITS: (1, T.F16, {}),
    "Q4_0": (2, T.Q4_0, {}),
    "Q2_K": (
        10,
        T.Q2_K,
        {
            "attn_v": lambda at: T.Q4_K if at.shared >= 4 else T.Q3_K,
            "ffn_down": T.Q3_K,
            "attn_output": T.Q3_K,
        },
    ),
    "Q3_K_M": (
        12,
        T.Q3_K,
        {
            "attn_v": lambda at: T.Q5_K if at.layer < 2 else T.Q4_K,
            "attn_qkv": T.Q4_K,
            "ffn_down": lambda at: T.Q5_K if at.layer < at.layers // 16 else T.Q4_K,
            "attn_output": T.Q4_K,
        },
    ),
    "Q4_K_M": (15, T.Q4_K, {"attn_v": _more, "attn_qkv": T.Q5_K, "ffn_down": _more}),
}


def type_of(
    name: str, layers: int, recipe: str, *, columns: int = SUPER_BLOCK, tied: bool = False, shared: int = 1
) -> T:
    """The type llama-quantize gives a matrix of a dense model.

    tied: the embedding is the output matrix. shared: query heads per key/value head.
    """
    _, kind, others = RECIPES[recipe]
    part = name.removesuffix(".weight").rpartition(".")[2]
    if recipe != SIXTEEN_BITS and (name == "output.weight" or (tied and name == "token_embd.weight")):
        kind = T.Q6_K
    elif part in others:
        other = others[part]
        kind = other if isinstance(other, T) else other(Place(int(name.split(".")[1]), layers, shared))
    for instead in (INSTEAD.get(kind, T.F16), T.F16):
        if columns % GGML_QUANT_SIZES[kind][0]:
            kind = instead
    return kind


def source_plans(model: Path) -> list[TensorPlan]:
    """Every tensor of a model folder as float32, under its GGUF name and in GGUF's order of rows."""
    folder = ModelFolder(model)
    family = family_of(folder.config)
    names = NameMap(family.gguf_arch, folder.config["num_hidden_layers"])

    def plan(name: str) -> TensorPlan:
        shape, heads = folder.entry(name).shape, family.permuted_heads(name.rpartition(".")[0], folder.config)
        order = np.arange(shape[0]) if heads is None else row_order(shape[0], heads)

        def load(rows: slice) -> NDArray[Any]:
            return as_stored(family, name, as_float32(folder.tensor(name))[order[rows]])

        return TensorPlan(names.to_gguf(name), F32, shape, load)

    return [plan(name) for name in folder.names()]


def quantize_folder(model: Path, exact: Path, out: Path, recipe: str) -> Path:
    """`out`: the model folder in one of RECIPES. exact: a GGUF file of a model of the same shape and tokenizer."""
    return quantize_plans(source_plans(model), ModelFolder(model).config, exact, out, recipe)


def quantize_plans(
    plans: Sequence[TensorPlan],
    config: Mapping[str, Any],
    exact: Path,
    out: Path,
    recipe: str,
    imatrix: Imatrix | None = None,
) -> Path:
    """`out`: float32 tensors quantized; each matrix is handed to llama.cpp a block of rows at a time.

    exact: a GGUF file of the same model, whose metadata and rotary divisors are taken. imatrix: importance of
    in-features by GGUF name. Raises RuntimeUnavailableError without llama.cpp's quantizer.
    """
    c = _library()
    layers = config["num_hidden_layers"]
    shared = config["num_attention_heads"] // (config.get("num_key_value_heads") or config["num_attention_heads"])
    tied = not any(plan.name == "output.weight" for plan in plans)
    plans = [*plans, *_rotary(exact, {plan.name for plan in plans})]
    types = {
        p.name: type_of(p.name, layers, recipe, columns=p.shape[1], tied=tied, shared=shared)
        if len(p.shape) == 2
        else T.F32
        for p in plans
    }
    sizes = {p.name: _row_bytes(types[p.name], p.shape[-1]) * (p.shape[0] if len(p.shape) == 2 else 1) for p in plans}
    with atomic_file(out, force=True) as temporary:
        writer = GGUFWriter(temporary, GgufFile(exact).metadata["general.architecture"])
        _copy_metadata(GGUFReader(exact), writer, RECIPES[recipe][0])
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


def _library() -> ctypes.CDLL:
    try:
        c = ctypes.CDLL(str(import_wheel().xllamacpp.__file__))
        c.ggml_quantize_chunk.restype = c_size_t
    except (MissingRuntimeError, OSError, AttributeError) as error:
        raise RuntimeUnavailableError(
            "llama.cpp's quantizer is not there",
            why=str(error),
            fix="pip install 'qalora-export[runtimes]' (package xllamacpp), or leave K-quants out of [compare] methods",
        ) from error
    c.ggml_quantize_chunk.argtypes = (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, ctypes.POINTER(c_float))
    return c


def _rotary(exact: Path, there: set[str]) -> list[TensorPlan]:
    """The divisors of rotary frequencies that a model of some families has in GGUF alone."""
    tensors = GgufFile(exact).tensors
    wanted = [name for name in (ROPE_FREQUENCIES, ROPE_LONG, ROPE_SHORT) if name in tensors and name not in there]
    return [TensorPlan(name, F32, tensors[name].shape, partial(_values, tensors[name])) for name in wanted]


def _values(tensor: StoredTensor, rows: slice) -> NDArray[Any]:
    return tensor.values[rows]


def _quantized(
    c: ctypes.CDLL, kind: T, values: NDArray[Any], importance: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    values = np.ascontiguousarray(values, np.float32)
    out = np.empty((values.shape[0], _row_bytes(kind, values.shape[1])), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    pointer = None if weights is None else weights.ctypes.data_as(ctypes.POINTER(c_float))
    written = c.ggml_quantize_chunk(int(kind), values.ctypes.data, out.ctypes.data, 0, *values.shape, pointer)
    if written != out.nbytes:
        raise RuntimeUnavailableError(
            f"llama.cpp wrote {written} bytes of {kind.name}, expected {out.nbytes}",
            fix="install a release of xllamacpp that qalora-export doctor knows",
        )
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
