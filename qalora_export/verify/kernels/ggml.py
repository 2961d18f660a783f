"""llama.cpp's matrix products: which arithmetic belongs to which tensor type, and the weights of a GGUF file.

Sources: ggml/src/ggml-cpu/ggml-cpu.c (type_traits_cpu: vec_dot_type), ggml-quants.c (quantize_row_*_ref), and for each
processor arch/*/quants.c and arch/*/repack.cpp (repacked weights see the same blocks). Measured with xllamacpp 2026.10,
whose x86 wheel is compiled for AVX2 and runs that code on every newer processor (llama_print_system_info), one token
and many: F32, F16, Q4_0, Q4_1 and Q8_0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from qalora_runtimes.taps import input_of, output_of

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.errors import RuntimeUnavailableError
from qalora_export.formats.gguf.file import GgufFile, StoredTensor
from qalora_export.formats.gguf.names import NameMap
from qalora_export.formats.gguf.permute import hf_order
from qalora_export.formats.gguf.types import BLOCK_TYPES, QK
from qalora_export.grid import SuperBlockGrid, unpack_codes
from qalora_export.models.families import family_of
from qalora_export.verify.kernels.arithmetic import (
    BF16,
    FLOAT16,
    FLOAT32,
    Arithmetic,
    Int8Blocks,
    SignedInt8Blocks,
    Weight,
)
from qalora_export.verify.kernels.products import Linear, Product, TappedGraph, linear_modules

HALF = np.dtype(np.float16)
HEAD_MODULE, HEAD, EMBEDDING = "lm_head", "output.weight", "token_embd.weight"
LOGITS = "result_output"


def _int8(name: str, *, stores_sums: bool) -> tuple[Arithmetic, ...]:
    return (
        Int8Blocks(f"{name}, x86", QK, HALF, "127/max", stores_sums=stores_sums),
        Int8Blocks(f"{name}, Arm", QK, HALF, "1/d", stores_sums=stores_sums),
        Int8Blocks(f"{name}, portable C", QK, HALF, "1/d", half="away", stores_sums=stores_sums),
    )


Q8_0, Q8_1, Q8_K = _int8("Q8_0", stores_sums=False), _int8("Q8_1", stores_sums=True), (SignedInt8Blocks("Q8_K"),)
WAYS: Mapping[str, tuple[Arithmetic, ...]] = {
    "F32": (FLOAT32,),
    "F16": (FLOAT16,),
    "BF16": (BF16,),
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL"), Q8_0),
    **dict.fromkeys(("Q4_1", "Q5_1"), Q8_1),
    **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"), Q8_K),
}


def tapped_graph(artifact: Path, adapter: Path | None, checkpoint: CanonicalCheckpoint) -> TappedGraph:
    """Every linear layer of a GGUF file, of a split one with its adapter.

    Raises RuntimeUnavailableError for a tensor type without an entry in WAYS.
    """
    config = checkpoint.config
    file, extra = GgufFile(artifact), GgufFile(adapter) if adapter else None
    family, names = family_of(config), NameMap(family_of(config).gguf_arch, config["num_hidden_layers"])
    linears = []
    for module in linear_modules(config):
        tied = module == HEAD_MODULE and HEAD not in file.tensors
        weight = EMBEDDING if tied else names.to_gguf(f"{module}.weight")
        products = [_product(weight, file.tensors[weight], artifact)]
        if extra is not None and f"{weight}.lora_a" in extra.tensors:
            products += _branch(weight, extra, products[0])
        heads = family.permuted_heads(module, config)
        order = None if heads is None else hf_order(products[0].shape[0], heads)
        linears.append(Linear(module, tuple(products), order))
    return TappedGraph(artifact, tuple(linears), LOGITS, lora=adapter)


def _product(weight: str, tensor: StoredTensor, artifact: Path) -> Product:
    if tensor.kind not in WAYS:
        raise RuntimeUnavailableError(
            f"the arithmetic of {tensor.kind} in llama.cpp is not known here", where=f"{artifact}: {weight}"
        )
    out, features = tensor.shape
    return Product(
        weight,
        input_of(weight),
        output_of(weight),
        (out, features),
        lambda rows: _rows(tensor, rows),
        WAYS[tensor.kind],
    )


def _branch(weight: str, adapter: GgufFile, base: Product) -> list[Product]:
    """lora_b · (lora_a · x): the first product only feeds the second."""
    a, b = (
        _product(f"{weight}.{part}", adapter.tensors[f"{weight}.{part}"], adapter.path) for part in ("lora_a", "lora_b")
    )
    return [replace(a, reads=base.x, summed=False), replace(b, reads=a.y)]


def _rows(tensor: StoredTensor, rows: slice) -> Weight:
    """d·q without the min of the block or group where it has one; else what gguf.quants dequantizes."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    stored = np.ascontiguousarray(tensor.rows[rows])
    kind = BLOCK_TYPES.get(tensor.kind)
    if kind is not None and isinstance(kind.grid, SuperBlockGrid) and not kind.grid.symmetric:
        bits, group = kind.native()
        matrix = kind.unpack(stored, bits=bits, group_size=group).unpack()
        scale, mins = matrix.scale.astype(np.float64), matrix.offset.astype(np.float64)
        return Weight(matrix.codes.astype(np.float64) * np.repeat(scale, group, axis=1), mins)
    if kind is None or "m" not in (kind.layout.names or ()):
        return Weight(dequantize(stored, GGMLQuantizationType(tensor.info.type)).astype(np.float64))
    blocks = stored.view(kind.layout)
    d, m = (np.ascontiguousarray(blocks[part]).view("<f2").astype(np.float64) for part in ("d", "m"))
    codes = unpack_codes(kind.take_codes(blocks), kind.carrier)
    return Weight(codes.astype(np.float64) * np.repeat(d, QK, axis=1), m)
