"""ONNX Runtime's matrix products on a CPU: MatMulNBits with int8 or float32 activations, its offset branch, MatMul.

Sources: docs/ContribOperators.md (MatMulNBits: accuracy_level 4 computes with int8 activations) and core/mlas/lib
(qnbitgemm.cpp; sqnbitgemm_kernel_*: QuantizeARow_CompInt8). Each block of x, as long as a group of the weights, becomes
int8 with a float32 step of max |x| / 127. Where a processor has no int8 kernel for the bits or the group, MLAS
dequantizes the weights and multiplies in float32. Measured with onnxruntime 1.31 on AVX-512 VNNI: 2, 4
and 8 bits; on AVX2 (an emulated Haswell): 2 bits, and 3 in containers of 4; with onnxruntime 1.27 on arm64 (emulated,
with the dot product and i8mm, and without): `make test-arm64`.

On arm64 with the dot product, MLAS hands 4-bit codes to KleidiAI (kai_matmul_clamp_f32_qai8dxp_qsi4c32p). That one
rounds whole rows of x, not blocks, and cuts the scales of the weights to bfloat16. It knows no zero points but 8: what
they are off by, (8 − z)·s, MLAS multiplies with the sums of x itself, in float32 and by scales that are not cut.
Without the dot product MLAS has no int8 kernel on arm64 and multiplies in float32.

With the dot product but without i8mm (sqnbitgemm_kernel_neon_int8.cpp, SQ8BitGemmKernel_BlkSum_CompInt8<true>), codes
in bytes meet unsigned activations, q + 128: the instruction at hand multiplies unsigned bytes. Sums over blocks of
s·d·Σ(q + 128)·code, of −s·z·d·Σ(q + 128) and of 128·d·s·(z·block − Σ code) are made in float32, one after the other,
and put together at the end, where most of them cancels.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.errors import RuntimeUnavailableError
from qalora_export.formats.onnx.read import OnnxContents, integers_of, read_back
from qalora_export.formats.onnx.tied_head import BLOCKS, TABLE
from qalora_export.verify.kernels.arithmetic import FLOAT32, Arithmetic, Int8Blocks, Int8Rows, Weight, cut_to_bfloat16
from qalora_export.verify.kernels.products import Linear, Product, TappedGraph, linear_modules

if TYPE_CHECKING:
    import onnx

INT8_LEVEL = 4
STEP = np.dtype(np.float32)
LOGITS = "logits"
TAPPED = "products.onnx"
KLEIDIAI, KLEIDIAI_BITS, KLEIDIAI_ZERO = "KleidiAI: int8 rows, scales cut to bfloat16", 4, 8
UNSIGNED, BYTE_BITS, UNSIGNED_ZERO = "int8 blocks of {} as unsigned bytes, Arm without i8mm", 8, 128
PASSES_ON = ("Cast", "Transpose", "Identity")  # between a stored weight and the product that reads it


def ways_of(level: int, block: int, container: int) -> tuple[Arithmetic, ...]:
    """container: bits in which the file has a code."""
    if level != INT8_LEVEL:
        return (FLOAT32,)
    rows: tuple[Arithmetic, ...] = (Int8Rows(KLEIDIAI, block),) if container == KLEIDIAI_BITS else ()
    if container == BYTE_BITS:
        rows = (Int8Blocks(UNSIGNED.format(block), block, STEP, "127/max", shift=UNSIGNED_ZERO),)
    return (
        Int8Blocks(f"int8 blocks of {block}, x86", block, STEP, "127/max"),
        Int8Blocks(f"int8 blocks of {block}, Arm", block, STEP, "1/d", half="away"),
        *rows,
        FLOAT32,
    )


def tapped_graph(folder: Path, checkpoint: CanonicalCheckpoint, workdir: Path) -> TappedGraph:
    """Every linear layer of an ONNX folder; a copy of its graph that also answers what they saw and gave."""
    contents = read_back(folder)
    graph = _Graph(contents)
    linears = tuple(Linear(module, tuple(graph.products(module))) for module in linear_modules(checkpoint.config))
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / TAPPED).write_bytes(_with_outputs(contents.model, linears))
    return TappedGraph(workdir / TAPPED, linears, LOGITS, data=contents.data_folder.resolve())


def _with_outputs(model: onnx.ModelProto, linears: tuple[Linear, ...]) -> bytes:
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    there = {output.name for output in model.graph.output}
    names = dict.fromkeys(name for linear in linears for p in linear.products for name in (p.x, p.y))
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in there)
    return bytes(copy.SerializeToString())


class _Graph:
    """Which values of the graph are the products of a module."""

    def __init__(self, contents: OnnxContents) -> None:
        self._contents = contents

    def products(self, module: str) -> Iterator[Product]:
        contents = self._contents
        if module not in contents.nodes:
            yield self._plain(module)
            return
        node = contents.nodes[module]
        out, features = contents.shape(module)
        level = integers_of(node).get("accuracy_level", 0)
        ways = ways_of(level, contents.modules[module][1], integers_of(node)["bits"])

        def codes(rows: slice) -> Weight:
            matrix = contents.packed(module, rows).unpack()
            return _of_codes(matrix.codes, contents.zeros(module, rows), matrix.scale)

        def cut(rows: slice) -> Weight:
            """s'·(q − 8), with s cut to bfloat16, and s·(8 − z), not cut."""
            matrix = contents.packed(module, rows).unpack()
            scale, zero = matrix.scale.astype(np.float64), contents.zeros(module, rows).astype(np.float64)
            short = cut_to_bfloat16(matrix.scale.astype(np.float32)).astype(np.float64)
            centered = matrix.codes.astype(np.float64) - KLEIDIAI_ZERO
            return Weight(centered * np.repeat(short, matrix.group_size, axis=1), (KLEIDIAI_ZERO - zero) * scale)

        places, rounded = (node.input[0], node.output[0], (out, features)), {KLEIDIAI: cut}
        yield Product(f"{module}.codes", *places, codes, ways, rounded=rounded)
        stored = contents.stored_offset(module)
        if stored is None:
            return

        def rest(rows: slice) -> Weight:
            """R = m + z·s, exact, for every in-feature of a group."""
            matrix, zero = contents.packed(module, rows), contents.zeros(module, rows).astype(np.float64)
            r = matrix.offset.astype(np.float64) + zero * matrix.scale.astype(np.float64)
            return Weight(np.repeat(r, matrix.group_size, axis=1))

        added = contents.offset_branch(module)
        if added is None:
            raise RuntimeUnavailableError(
                "the offset is in the file but not in the graph", where=f"{contents.folder}: {stored}"
            )
        yield Product(stored, node.input[0], added[0], (out, features), rest, (FLOAT32,))

    def _plain(self, module: str) -> Product:
        """The MatMul of a weight that is not quantized; lm_head may be the embedding."""
        names = (f"{module}.weight", *(("model.embed_tokens.weight",) if module == "lm_head" else ()))
        for node in self._contents.model.graph.node:
            if node.op_type == "MatMulNBits" and node.input[1].removesuffix(BLOCKS) in self._contents.embeddings:
                return self._tied(node, node.input[1].removesuffix(BLOCKS))
            weight = self._source(node.input[1]) if node.op_type == "MatMul" else ""
            if weight in names:
                out, features = self._contents.shape(weight)

                def rows(wanted: slice, weight: str = weight) -> Weight:
                    return Weight(self._contents.tensor(weight, wanted).astype(np.float64))

                return Product(weight, node.input[0], node.output[0], (out, features), rows, (FLOAT32,))
        raise RuntimeUnavailableError(
            "no matrix product of this module was found", where=f"{self._contents.folder}: {module}"
        )

    def _tied(self, node: onnx.NodeProto, module: str) -> Product:
        """lm_head on the codes of the embedding, in bytes."""
        contents, said = self._contents, integers_of(node)

        def codes(rows: slice) -> Weight:
            found, zero, scale, _ = contents.embedding_parts(module, rows)
            return _of_codes(found, zero, scale)

        ways = ways_of(said.get("accuracy_level", 0), said["block_size"], said["bits"])
        shape = contents.shape(f"{module}.weight")
        return Product(f"{module}.codes", node.input[0], node.output[0], (shape[0], shape[1]), codes, ways)

    def _source(self, name: str) -> str:
        """The tensor that a value is, but for its type and the order of its axes; "" if it is another thing."""
        producers = self._contents.producers
        while name in producers and producers[name].op_type in PASSES_ON:
            name = producers[name].input[0]
        module = name.removesuffix(TABLE)
        if module != name and module in self._contents.embeddings:
            return f"{module}.weight"
        return name if name in self._contents.initializers else ""


def _of_codes(codes: NDArray[np.uint8], zero: NDArray[np.uint8], scale: NDArray[Any]) -> Weight:
    """s·q and −s·z: kernels multiply unsigned codes and take the zero point off by the sums of x̂.

    codes (rows, in), the others (rows, groups).
    """
    wide = scale.astype(np.float64)
    size = codes.shape[1] // scale.shape[1]
    return Weight(codes.astype(np.float64) * np.repeat(wide, size, axis=1), -zero.astype(np.float64) * wide)
