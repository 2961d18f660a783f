"""Linear layers of a mobius graph by MatMulNBits: MatMul(x, Transpose(W)) -> the kernel's part and that of the offsets.

y  = MatMulNBits(x, codes, scale[, zero points])              (batch, sequence, out)
y += ReduceSum_g(x) · remainderᵀ                              one GroupSum for every product of the same x
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qalora_export.errors import InputError

MICROSOFT = "com.microsoft"
FLOAT = ir.DataType.FLOAT


class Products:
    """constant: an initializer of a graph's own by name, made where there is none."""

    def __init__(self, graph: ir.Graph, accuracy_level: int, constant: Callable[[str, NDArray[Any]], ir.Value]) -> None:
        self.graph, self.accuracy_level, self._constant = graph, accuracy_level, constant
        self._group_sums: dict[tuple[str, int], ir.Value] = {}

    def replace(
        self,
        transposed: list[ir.Node],
        module: str,
        container: int,
        weights: dict[str, ir.Value],
        shape: tuple[int, int, int],
    ) -> None:
        """The products with a matrix that these nodes turn, by MatMulNBits. shape: (out, groups, group size)."""
        for transpose in transposed:
            for use in list(transpose.outputs[0].uses()):
                if transpose.op_type != "Transpose" or use.node.op_type != "MatMul" or use.idx != 1:
                    raise InputError(
                        f"a quantized weight feeds {use.node.op_type}",
                        where=module,
                        why="only linear layers can be quantized",
                        fix="add a skip rule",
                    )
                self._replace(use.node, module, container, weights, shape)
            self.graph.remove(transpose, safe=True)

    def _replace(
        self, matmul: ir.Node, module: str, container: int, weights: dict[str, ir.Value], shape: tuple[int, int, int]
    ) -> None:
        x = matmul.inputs[0]
        if x is None:
            raise InputError("a linear layer has no input", where=module)
        out, groups, group_size = shape
        scale32 = [to_float(weights["scale"], f"{module}/scale/Cast")] if weights["scale"].dtype != FLOAT else []
        scale = scale32[0].outputs[0] if scale32 else weights["scale"]
        product = ir.node(
            "MatMulNBits",
            [x, weights["codes"], scale, *([weights["zero_points"]] if "zero_points" in weights else [])],
            {
                "K": groups * group_size,
                "N": out,
                "bits": container,
                "block_size": group_size,
                "accuracy_level": self.accuracy_level,
            },
            domain=MICROSOFT,
            name=f"{module}/MatMulNBits",
        )
        nodes = [*scale32, product]
        if "remainder" in weights:
            group_sum = self._group_sum(x, groups, group_size, before=matmul)
            nodes += self._remainder(module, weights["remainder"], group_sum, product.outputs[0])
        ir.convenience.replace_nodes_and_values(
            self.graph, matmul, [matmul], nodes, [matmul.outputs[0]], [nodes[-1].outputs[0]]
        )

    def _remainder(self, module: str, remainder: ir.Value, group_sum: ir.Value, product: ir.Value) -> list[ir.Node]:
        """Nodes of product + GroupSum · Rᵀ. All but the last two are constant-folded when the session starts."""
        nodes = [to_float(remainder, f"{module}/remainder/Cast")] if remainder.dtype != FLOAT else []
        wide = nodes[0].outputs[0] if nodes else remainder
        nodes.append(ir.node("Transpose", [wide], {"perm": [1, 0]}, name=f"{module}/remainder/Transpose"))
        nodes.append(ir.node("MatMul", [group_sum, nodes[-1].outputs[0]], name=f"{module}/remainder/MatMul"))
        nodes.append(ir.node("Add", [product, nodes[-1].outputs[0]], name=f"{module}/Add"))
        return nodes

    def _group_sum(self, x: ir.Value, groups: int, group_size: int, *, before: ir.Node) -> ir.Value:
        """(batch, sequence, in) -> (batch, sequence, groups), made once per x and group count."""
        key = (x.name or "", groups)
        if key not in self._group_sums:
            shape = self._constant(f"group_shape_{groups}x{group_size}", np.array([0, 0, groups, group_size], np.int64))
            axis = self._constant("group_axis", np.array([3], np.int64))
            grouped = ir.node("Reshape", [x, shape], name=f"{x.name}/groups{groups}/Reshape")
            summed = ir.node(
                "ReduceSum", [grouped.outputs[0], axis], {"keepdims": 0}, name=f"{x.name}/groups{groups}/ReduceSum"
            )
            self.graph.insert_before(before, [grouped, summed])
            self._group_sums[key] = summed.outputs[0]
        return self._group_sums[key]


def to_float(value: ir.Value, name: str) -> ir.Node:
    """`value` as float32."""
    node = ir.node("Cast", [value], {"to": int(FLOAT)}, name=name)
    node.outputs[0].type = ir.TensorType(FLOAT)
    node.outputs[0].shape = value.shape
    return node
