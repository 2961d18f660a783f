"""lm_head as an embedding in blocks has it: the tensors are in the file once, and the graph reads them twice.

Int8 activations (accuracy level 4), a symmetric matrix: MatMulNBits on the same codes, as any quantized layer. Else a
float32 product with

    table = (float(codes) − float(zero points)) · scale + R      (out, in), group by group

which is constant and of ONNX's own operators, so that ONNX Runtime folds it into one float32 initializer as a session
starts. (It does not fold its own GatherBlockQuantized, and its MatMulNBits without int8 makes float32 of codes in bytes
anew for every token.) Each step is exact but the sum, as in embeddings.py. Of codes in bytes only: nibbles would have
to be taken apart first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

HEAD = "lm_head"
FLOAT = 1  # onnx.TensorProto.FLOAT
MIDDLE = 128  # z where a file has no zero points
TABLE, BLOCKS = (
    "/table",
    "/blocks",
)  # behind the module: names of the float32 matrix, and of codes as MatMulNBits has them


@dataclass(frozen=True, slots=True)
class Step:
    """One node: inputs are names of steps before it, of tensors, or of constants that come with it."""

    operator: str
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Chain:
    """steps in order, the last one's output is the result; constants by name."""

    steps: list[Step]
    constants: dict[str, NDArray[Any]]


def table_of(module: str, parts: Mapping[str, str], width: int, group_size: int) -> Chain:
    """The float32 matrix (out, width) of an embedding.

    parts: names of codes (out, width) in bytes and scale (out, groups), of zero_points and remainder where there are
    any.
    """
    name, steps = f"{module}{TABLE}", list[Step]()
    last, grouped, rows, middle = (f"{name}/{part}" for part in ("last_axis", "groups", "rows", "middle"))

    def then(operator: str, *inputs: str, step: str, **attributes: int) -> str:
        steps.append(Step(operator, inputs, name if step == "Flatten" else f"{name}/{step}", attributes))
        return steps[-1].output

    def of_groups(part: str) -> str:
        wide = then("Cast", parts[part], step=f"{part}/Cast", to=FLOAT)
        return then("Unsqueeze", wide, last, step=f"{part}/Unsqueeze")

    table = then("Reshape", parts["codes"], grouped, step="Reshape")  # while it is small
    table = then("Cast", table, step="Cast", to=FLOAT)
    table = then("Sub", table, of_groups("zero_points") if "zero_points" in parts else middle, step="Sub")
    table = then("Mul", table, of_groups("scale"), step="Mul")
    if "remainder" in parts:
        table = then("Add", table, of_groups("remainder"), step="Add")
    then("Reshape", table, rows, step="Flatten")
    constants: dict[str, NDArray[Any]] = {
        last: np.array([-1], np.int64),
        grouped: np.array([0, -1, group_size], np.int64),
        rows: np.array([-1, width], np.int64),
        middle: np.array(MIDDLE, np.float32),
    }
    used = {given for step in steps for given in step.inputs}
    return Chain(steps, {key: value for key, value in constants.items() if key in used})


def without_int8(model: onnx.ModelProto) -> None:
    """Let every head that reads its codes in int8 read the float32 matrix instead, in place."""
    from onnx import helper, numpy_helper

    nodes, makers = list(model.graph.node), {name: node for node in model.graph.node for name in node.output}
    for at, node in enumerate(nodes):
        blocks = makers.get(node.input[1]) if node.op_type == "MatMulNBits" else None
        if blocks is None or not blocks.output[0].endswith(BLOCKS):
            continue
        module, said = blocks.output[0].removesuffix(BLOCKS), {a.name: a.i for a in node.attribute}
        parts = {"codes": blocks.input[0], "scale": node.input[2]}
        parts |= {"zero_points": node.input[3]} if len(node.input) > 3 and node.input[3] else {}
        chain, turned = table_of(module, parts, said["K"], said["block_size"]), f"{module}{TABLE}/Transpose"
        made = [helper.make_node(s.operator, s.inputs, [s.output], name=s.output) for s in chain.steps]
        for one, step in zip(made, chain.steps, strict=True):
            one.attribute.extend(helper.make_attribute(key, number) for key, number in step.attributes.items())
        made.append(helper.make_node("Transpose", [chain.steps[-1].output], [turned], name=turned, perm=[1, 0]))
        product = helper.make_node("MatMul", [node.input[0], turned], list(node.output), name=node.name)
        nodes[at : at + 1] = [*made, product]
        nodes.remove(blocks)
        model.graph.initializer.extend(numpy_helper.from_array(v, key) for key, v in chain.constants.items())
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        return  # there is one lm_head
