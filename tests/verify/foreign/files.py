"""GGUF files as other tools make them: every type by llama.cpp's own quantizer, and any of their parts changed.

Nothing here uses the exporter but for the first, unquantized file, which the real tools' own files stand beside
(tests/real).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

from qalora_export.checkpoint.canonical_writer import CanonicalWriter
from qalora_export.checkpoint.manifest import parent_of
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.formats.gguf.export import export_gguf
from qalora_export.recipe import GgufSettings

T = GGMLQuantizationType
Values = dict[str, np.ndarray]  # GGUF tensor name -> float32, rows in GGUF's order
Change = Callable[[Values], None]
GONE = object()  # of a metadata key: it is left out


def unquantized(model: Path, out: Path) -> Path:
    """A plain model as GGUF in its own precision: `out`/model-f16.gguf."""
    folder = ModelFolder(model)
    with CanonicalWriter(
        out / "plain", folder.config, folder.companions(), kind="base", parents=[parent_of(model, "source")]
    ) as writer:
        for name, tensor in folder.tensors():
            writer.add(name, np.asarray(tensor))
    export_gguf(out / "plain", out / "model-f16.gguf", GgufSettings())
    return out / "model-f16.gguf"


def rewritten(
    source: Path,
    out: Path,
    kinds: Mapping[str, str] | str = "F16",
    *,
    change: Change = lambda _: None,
    metadata: Mapping[str, Any] | None = None,
    importance: Callable[[str, int], np.ndarray | None] = lambda _name, _columns: None,
) -> Path:
    """source, a file of plain numbers, with matrices in the types `kinds` (one for all, or by name with "" for the
    rest), tensors changed by `change` before they are quantized, and metadata replaced or left out.
    """
    reader, edits = GGUFReader(source), dict(metadata or {})
    values = {t.name: dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
    change(values)
    arch = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(out, arch)
    for field in reader.fields.values():
        if field.name.startswith(("GGUF.", "qalora.")) or field.name == "general.architecture":
            continue
        value = edits.pop(field.name, field.contents())
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        if value is not GONE:
            writer.add_key_value(field.name, value, field.types[0], inner)
    for key, value in edits.items():
        kind = {int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}[type(value)]
        writer.add_key_value(key, value, kind)
    for name, array in values.items():
        kind = T.F32 if array.ndim == 1 else T[kinds if isinstance(kinds, str) else kinds.get(name, kinds[""])]
        raw = quantized(array, kind, importance(name, array.shape[-1]))
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def quantized(values: np.ndarray, kind: T, importance: np.ndarray | None = None) -> np.ndarray:
    """The bytes of a matrix in a type, by ggml_quantize_chunk of the installed llama.cpp."""
    if kind == T.F32:
        return np.ascontiguousarray(values, np.float32)
    if kind == T.F16:
        return np.ascontiguousarray(values, np.float16)
    values = np.ascontiguousarray(values, np.float32)
    block, size = GGML_QUANT_SIZES[kind]
    out = np.empty((values.shape[0], values.shape[1] // block * size), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    pointer = None if weights is None else weights.ctypes.data
    written = _ggml().ggml_quantize_chunk(int(kind), values.ctypes.data, out.ctypes.data, 0, *values.shape, pointer)
    assert written == out.nbytes, kind
    return out


@cache
def _ggml() -> Any:
    import xllamacpp

    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    sizes = (ctypes.c_int64,) * 3
    library.ggml_quantize_chunk.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *sizes, ctypes.c_void_p)
    return library
