"""Dequantized weights as ONNX Runtime itself computes them, from the file's own nodes and bytes (gate G1).

For each module the nodes between its input x and its output are cut out of the graph and fed the identity, so that row
k of the result is column k of the weight. With accuracy_level 1 a product with a one-hot row is exact, hence what comes
out is float32(s·(q − z) + R) as the runtime's kernels see it. In-features go through in slices of a few groups (the
kernel's work is in²·out otherwise): the initializers are cut along in-features, the nodes stay as they are in the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import RuntimeUnavailableError, UnsafeInputError
from qalora_export.formats.onnx.exact import EXACT_LEVEL, set_attribute
from qalora_export.formats.onnx.readback import OnnxContents, read_back

if TYPE_CHECKING:
    import onnx

SLICE_GROUPS = 8  # packed zero points of 8 groups fill whole bytes at any width


def runtime_dequantized(folder: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield (module, float32 (out, in)), one module in memory at a time.

    Raises RuntimeUnavailableError when onnxruntime is missing or fails, UnsafeInputError for a graph that is not in
    our split form.
    """
    contents = read_back(folder)
    for module in contents.modules:
        yield module, _dequantize(contents, module)


def _dequantize(contents: OnnxContents, module: str) -> NDArray[np.float32]:
    linear = _Linear.cut(contents, module)
    out, groups, _ = linear.parts["codes"].shape
    columns = [linear.run(start, min(groups, start + SLICE_GROUPS)) for start in range(0, groups, SLICE_GROUPS)]
    return np.concatenate(columns, axis=0).T.reshape(out, -1)


@dataclass(frozen=True)
class _Linear:
    """The nodes of one module, in graph order; parts: codes, scale, offset, zero_points by their last name."""

    module: str
    nodes: list[onnx.NodeProto]
    parts: dict[str, NDArray]
    constants: dict[str, NDArray]
    group_size: int
    x: str
    y: str

    @classmethod
    def cut(cls, contents: OnnxContents, module: str) -> _Linear:
        product = contents.nodes[module]
        x, y = product.input[0], product.output[0]
        producers = {name: node for node in contents.model.graph.node for name in node.output}
        if f"{module}.offset" in contents.initializers:
            y = _sum_with(contents, product.output[0], f"{module}.offset", producers)
        wanted = _ancestors(y, x, producers)
        nodes = [node for node in contents.model.graph.node if set(node.output) & wanted]
        names = {name for node in nodes for name in node.input if name in contents.initializers}
        parts = {name.removeprefix(f"{module}."): name for name in names if name.startswith(f"{module}.")}
        return cls(
            module, nodes, {part: contents.tensor(name) for part, name in parts.items()},
            {name: contents.tensor(name) for name in names if name not in parts.values()},
            contents.modules[module][1], x, y,
        )  # fmt: skip

    def run(self, start: int, stop: int) -> NDArray[np.float32]:
        """Identity through groups [start, stop): ((stop − start)·g, out)."""
        features = (stop - start) * self.group_size
        session = _session(self._model(start, stop).SerializeToString(), self.module)
        return session.run([self.y], {self.x: np.eye(features, dtype=np.float32)[None]})[0][0]

    def _model(self, start: int, stop: int) -> onnx.ModelProto:
        import onnx
        from onnx import helper, numpy_helper

        features = (stop - start) * self.group_size
        tensors = {f"{self.module}.{part}": self._sliced(part, start, stop) for part in self.parts}
        nodes = []
        for node in self.nodes:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            if copy.op_type == "MatMulNBits":
                set_attribute(copy, "K", features)
                set_attribute(copy, "accuracy_level", EXACT_LEVEL)
            if copy.op_type == "Reshape" and copy.input[0] == self.x:
                tensors[copy.input[1]] = np.array([0, 0, stop - start, self.group_size], np.int64)
            nodes.append(copy)
        arrays = self.constants | tensors
        graph = helper.make_graph(
            nodes, "linear", [helper.make_tensor_value_info(self.x, onnx.TensorProto.FLOAT, [1, features, features])],
            [helper.make_tensor_value_info(self.y, onnx.TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in arrays.items()],
        )  # fmt: skip
        opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def _sliced(self, part: str, start: int, stop: int) -> NDArray:
        if part != "zero_points":
            return self.parts[part][:, start:stop]
        bits = self.parts["codes"].shape[2] * 8 // self.group_size
        return self.parts[part][:, start * bits // 8 : -(-stop * bits // 8)]


def _ancestors(y: str, x: str, producers: dict[str, onnx.NodeProto]) -> set[str]:
    """Names of the values that `y` is computed from, not going beyond `x`."""
    found: set[str] = set()
    waiting = [y]
    while waiting:
        name = waiting.pop()
        if name and name != x and name not in found and name in producers:
            found.add(name)
            waiting += producers[name].input
    return found


def _sum_with(contents: OnnxContents, product: str, offset: str, producers: dict[str, onnx.NodeProto]) -> str:
    """The output of the Add that joins the product and the branch made from `offset`."""
    for node in contents.model.graph.node:
        if node.op_type == "Add" and product in node.input:
            reached = {name for value in _ancestors(node.output[0], "", producers) for name in producers[value].input}
            if offset in reached:
                return str(node.output[0])
    raise UnsafeInputError("the offset is in the file but not in the graph", where=f"{contents.folder}: {offset}",
                           fix="export the checkpoint again")  # fmt: skip


def _session(model: bytes, where: str) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeUnavailableError("onnxruntime is not installed", fix="pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise RuntimeUnavailableError(f"ONNX Runtime cannot run a linear layer: {error}", where=where) from error
