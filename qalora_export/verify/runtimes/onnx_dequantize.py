"""Dequantized weights as ONNX Runtime itself computes them, from the file's own nodes and bytes (gate G1).

For each module the nodes between its input x and its output are cut out of the graph and fed the identity, so that row
k of the result is column k of the weight. With accuracy_level 1 a product with a one-hot row is exact, hence what comes
out is float32(s·(q − z) + R) as the runtime's kernels see it. In-features go through in slices of a few groups (the
kernel's work is in²·out otherwise): the initializers are cut along in-features, the nodes stay as they are in the file.

The graphs are made here and run in processes of their own (qalora_runtimes.onnxruntime_.linears).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from qalora_runtimes.arrays import ProtocolError
from qalora_runtimes.onnxruntime_.linears import LinearsResult, run_linears

from qalora_export.errors import RuntimeUnavailableError, UnsafeInputError
from qalora_export.formats.onnx.exact import EXACT_LEVEL, set_attribute
from qalora_export.formats.onnx.read import OnnxContents, read_back

if TYPE_CHECKING:
    import onnx

SLICE_GROUPS = 8  # packed zero points of 8 groups fill whole bytes at any width
# Answers on the disk at a time. One process gives them all, so a smaller number pays more often for its start.
BATCH_BYTES = 512 << 20

RunLinears = Callable[[Iterator[bytes], Path], LinearsResult]


def runtime_dequantized(
    folder: Path, workdir: Path, *, run: RunLinears = run_linears
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield (module, float32 (out, in)), one module in memory at a time.

    workdir: for graphs and answers, made if missing. run: stands in for run_linears.

    Raises RuntimeUnavailableError when onnxruntime is missing, crashes or fails, UnsafeInputError for a graph that is
    not in our split form.
    """
    contents = read_back(folder)
    slices = [piece for module in contents.modules for piece in _slices(contents, module)]
    matrix = np.empty((0, 0), np.float32)
    for batch in _batches(slices):
        for piece, values in _answers(contents, batch, workdir, run):
            if piece.start == 0:
                matrix = np.empty((piece.out, piece.groups * piece.group_size), np.float32)
            matrix[:, piece.columns] = values.T
            if piece.stop == piece.groups:
                yield piece.module, matrix


@dataclass(frozen=True)
class _Slice:
    """Groups [start, stop) of one module, which has `groups` groups in each of `out` rows."""

    module: str
    out: int
    groups: int
    group_size: int
    start: int
    stop: int

    @property
    def columns(self) -> slice:
        return slice(self.start * self.group_size, self.stop * self.group_size)

    @property
    def features(self) -> int:
        return (self.stop - self.start) * self.group_size

    @property
    def nbytes(self) -> int:
        return self.features * self.out * np.dtype(np.float32).itemsize


def _slices(contents: OnnxContents, module: str) -> Iterator[_Slice]:
    shape, (_, group_size) = tuple(contents.initializers[f"{module}.codes"].dims), contents.modules[module]
    if len(shape) != 3:
        raise UnsafeInputError(
            f"codes of shape {shape}, not (out, groups, bytes)",
            where=f"{contents.folder}: {module}",
            fix="export the checkpoint again",
        )
    out, groups, _ = shape
    for start in range(0, groups, SLICE_GROUPS):
        yield _Slice(module, out, groups, group_size, start, min(groups, start + SLICE_GROUPS))


def _batches(slices: list[_Slice]) -> Iterator[list[_Slice]]:
    """The slices in order, as many at a time as give BATCH_BYTES of answers, at least one."""
    batch, size = list[_Slice](), 0
    for piece in slices:
        if batch and size + piece.nbytes > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += piece.nbytes
    if batch:
        yield batch


def _answers(
    contents: OnnxContents, batch: list[_Slice], workdir: Path, run: RunLinears
) -> Iterator[tuple[_Slice, NDArray[np.float32]]]:
    """Each slice with what it gave for the identity, float32 (features, out)."""
    result = run(_graphs(contents, batch), workdir)
    if result.status != "ok":
        at = batch[min(result.last, len(batch) - 1)].module if result.last is not None else ""
        raise RuntimeUnavailableError(
            result.message,
            where=f"{contents.folder}: {at}" if at else contents.folder,
            why=f"while {at} was dequantized" if at else "",
        )
    try:
        for piece, values in zip(batch, result.values, strict=True):
            if values.dtype != np.float32 or values.shape != (piece.features, piece.out):
                raise RuntimeUnavailableError(
                    f"ONNX Runtime answered {values.dtype}{values.shape}, not float32{(piece.features, piece.out)}",
                    where=f"{contents.folder}: {piece.module}",
                    why=f"while {piece.module} was dequantized",
                )
            yield piece, values
    except ProtocolError as error:
        raise RuntimeUnavailableError(
            "ONNX Runtime ended without usable values", where=contents.folder, why=str(error)
        ) from error


def _graphs(contents: OnnxContents, batch: list[_Slice]) -> Iterator[bytes]:
    """The serialized graph of each slice, the tensors of one module in memory at a time."""
    linear: _Linear | None = None
    for piece in batch:
        if linear is None or linear.module != piece.module:
            linear = _Linear.cut(contents, piece.module)
        yield linear.model(piece.start, piece.stop).SerializeToString()


@dataclass(frozen=True)
class _Linear:
    """The nodes of one module, in graph order; parts: codes, scale, remainder, zero_points by their last name."""

    module: str
    nodes: list[onnx.NodeProto]
    parts: dict[str, NDArray[Any]]
    constants: dict[str, NDArray[Any]]
    group_size: int
    x: str
    y: str

    @classmethod
    def cut(cls, contents: OnnxContents, module: str) -> _Linear:
        product = contents.nodes[module]
        x, y = product.input[0], product.output[0]
        if (stored := contents.stored_offset(module)) is not None:
            added = contents.offset_branch(module)
            if added is None:
                raise UnsafeInputError(
                    "the remainder is in the file but not in the graph",
                    where=f"{contents.folder}: {stored}",
                    fix="export the checkpoint again",
                )
            y = added[1]
        wanted = contents.ancestors(y, until=x)
        nodes = [node for node in contents.model.graph.node if set(node.output) & wanted]
        names = {name for node in nodes for name in node.input if name in contents.initializers}
        parts = {name.removeprefix(f"{module}."): name for name in names if name.startswith(f"{module}.")}
        return cls(
            module,
            nodes,
            {part: contents.tensor(name) for part, name in parts.items()},
            {name: contents.tensor(name) for name in names if name not in parts.values()},
            contents.modules[module][1],
            x,
            y,
        )

    def model(self, start: int, stop: int) -> onnx.ModelProto:
        """These nodes on groups [start, stop): x float32 (1, features, features) → y (1, features, out)."""
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
            nodes,
            "linear",
            [helper.make_tensor_value_info(self.x, onnx.TensorProto.FLOAT, [1, features, features])],
            [helper.make_tensor_value_info(self.y, onnx.TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in arrays.items()],
        )
        opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def _sliced(self, part: str, start: int, stop: int) -> NDArray[Any]:
        if part != "zero_points":
            return self.parts[part][:, start:stop]
        bits = self.parts["codes"].shape[2] * 8 // self.group_size
        return self.parts[part][:, start * bits // 8 : -(-stop * bits // 8)]
