"""What the ONNX tests share: one-linear folders (milliseconds) and plain ways to run a decoder folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from hypothesis import strategies as st
from qalora_runtimes.onnxruntime_.linears import LinearsResult, on_identity

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.canonical_writer import CanonicalWriter
from qalora_export.formats.onnx.datafile import DataFile
from qalora_export.formats.onnx.read import MODULES_KEY
from qalora_export.formats.onnx.rewrite import Rewriter
from qalora_export.formats.onnx.split_form import WrittenForm
from qalora_export.grid import GroupAffine

LINEAR = "model.layers.0.mlp.down_proj"
FLOAT16_VALUES = st.one_of(
    st.floats(width=16, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 2.0**-24, -(2.0**-24), 2.0**-14, 65504.0, -65504.0, 1.0, 0.1]),
)


@st.composite
def matrices(draw: st.DrawFn, ordinary: bool = False) -> GroupAffine:
    """Quantized matrices of every bit width and group size, by default with extreme scales and offsets."""
    bits, group = draw(st.sampled_from([2, 3, 4, 5, 6, 8])), draw(st.sampled_from([16, 32, 64, 128]))
    out, groups = draw(st.integers(1, 9)), draw(st.integers(1, 11))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    codes = rng.integers(0, 2**bits, (out, groups * group), dtype=np.uint8)
    if ordinary:
        scale = (rng.uniform(0.01, 0.8, (out, groups)) / 2 ** (bits - 1)).astype(np.float16)  # |weights| below 1
        return GroupAffine(codes, scale, rng.uniform(-0.9, 0.2, (out, groups)).astype(np.float16), bits)
    pool = np.array(draw(st.lists(FLOAT16_VALUES, min_size=1, max_size=12)), np.float16)
    scale, offset = rng.choice(pool, (out, groups)), rng.choice(pool, (out, groups))
    if draw(st.booleans()) and np.abs(scale.astype(np.float64)).max() * 2 ** (bits - 1) <= 65504:
        offset = (np.float32(-(2 ** (bits - 1))) * scale.astype(np.float32)).astype(np.float16)  # symmetric
    return GroupAffine(codes, scale, offset, bits)


def linear_folder(path: Path, matrix: GroupAffine, *, accuracy_level: int = 1) -> WrittenForm:
    """y = x · Wᵀ as a mobius graph would hold it, rewritten by the product's pass into `path`/onnx."""
    with CanonicalWriter(path / "checkpoint", {}, kind="base") as writer:
        writer.add_quantized(LINEAR, matrix)
    weight = ir.Value(name=f"{LINEAR}.weight", shape=ir.Shape(matrix.shape), type=ir.TensorType(ir.DataType.FLOAT))
    x = ir.Value(name="x", shape=ir.Shape(["b", "s", matrix.shape[1]]), type=ir.TensorType(ir.DataType.FLOAT))
    transpose = ir.node("Transpose", [weight], {"perm": [1, 0]})
    matmul = ir.node("MatMul", [x, transpose.outputs[0]])
    matmul.outputs[0].name, matmul.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [x], matmul.outputs, nodes=[transpose, matmul], name="linear", opset_imports={"": 24, "com.microsoft": 1}
    )
    graph.initializers[weight.name] = weight
    model = ir.Model(graph, ir_version=10)
    folder = path / "onnx"
    folder.mkdir()
    with DataFile(folder) as data:
        rewriter = Rewriter(model, CanonicalCheckpoint(path / "checkpoint"), data, accuracy_level)
        for value in rewriter.weights():
            rewriter.place(value)
        rewriter.finish()
    model.metadata_props[MODULES_KEY] = json.dumps({LINEAR: [matrix.bits, matrix.group_size]})
    ir.save(model, folder / "onnx/model.onnx")
    return rewriter.forms[LINEAR]


def run_linear(folder: Path, x: np.ndarray) -> np.ndarray:
    """(batch, sequence, in) -> (batch, sequence, out) by ONNX Runtime."""
    return session(folder).run(["y"], {"x": x})[0]


def session(folder: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(folder / "onnx/model.onnx", options, providers=["CPUExecutionProvider"])


def run_here(graphs: Iterator[bytes], _workdir: Path) -> LinearsResult:
    """In place of run_linears, for many tiny matrices: starting a process takes longer than its work."""
    return LinearsResult("ok", values=[on_identity(ort, graph) for graph in graphs])


def prefill(folder: Path, ids: np.ndarray) -> np.ndarray:
    """ids (batch, sequence) -> logits (batch, sequence, vocabulary), one run with an empty KV cache."""
    runtime = session(folder)
    return runtime.run(["logits"], _feed(runtime, ids, len(ids[0]), _empty_cache(runtime, len(ids))))[0]


def decode(folder: Path, ids: np.ndarray) -> np.ndarray:
    """The same logits token by token through the KV cache."""
    runtime = session(folder)
    cache, rows = _empty_cache(runtime, len(ids)), []
    for at in range(ids.shape[1]):
        logits, *present = runtime.run(None, _feed(runtime, ids[:, at : at + 1], at + 1, cache))
        cache = dict(zip(cache, present, strict=True))
        rows.append(logits)
    return np.concatenate(rows, axis=1)


def _empty_cache(runtime: ort.InferenceSession, batch: int) -> dict[str, Any]:
    inputs = [node for node in runtime.get_inputs() if node.name.startswith("past")]
    return {node.name: np.zeros((batch, node.shape[1], 0, node.shape[3]), np.float32) for node in inputs}


def _feed(runtime: ort.InferenceSession, ids: np.ndarray, total: int, cache: dict[str, Any]) -> dict[str, Any]:
    return {"input_ids": ids, "attention_mask": np.ones((len(ids), total), np.int64), **cache}


def worst_nmse(logits: np.ndarray, reference: np.ndarray) -> float:
    """Largest over positions of ‖logits − reference‖² / ‖reference‖²."""
    error = ((logits.astype(np.float64) - reference) ** 2).sum(-1)
    return float((error / (reference.astype(np.float64) ** 2).sum(-1)).max())


def proto(folder: Path) -> onnx.ModelProto:
    return onnx.load(folder / "onnx/model.onnx", load_external_data=False)


def node_types(folder: Path) -> list[str]:
    return [node.op_type for node in proto(folder).graph.node]
