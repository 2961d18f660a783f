"""The onnx_ir pass: mobius graph without weights + canonical checkpoint -> our graph, weights streamed to disk.

Per quantized module M, with x (batch, sequence, in) and G = in/g groups:

    scale32 = Cast(M.scale), or M.scale where it is float32         (out, G)
    y       = MatMulNBits(x, M.codes, scale32[, M.zero_points])   (batch, sequence, out)
    y      += ReduceSum_g(x) · Cast(M.remainder)ᵀ                 the GroupSum is shared by every M with the same x

An embedding in blocks stays in blocks (embeddings.py), in bytes also where it is lm_head (tied_head.py). Everything
else keeps its source bytes in the file and is cast to float32 in the graph. No g_idx is ever emitted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.errors import InputError
from qalora_export.formats.contents import exported_names
from qalora_export.formats.onnx.datafile import DataFile
from qalora_export.formats.onnx.embeddings import ELEMENT_BITS, TIED_BITS, element_codes, embedding_form
from qalora_export.formats.onnx.exact import EXACT_LEVEL
from qalora_export.formats.onnx.products import FLOAT, MICROSOFT, Products, to_float
from qalora_export.formats.onnx.split_form import SplitForm, WrittenForm, choose_form, to_blocks, zero_points
from qalora_export.formats.onnx.tied_head import BLOCKS, HEAD, table_of
from qalora_export.formats.streaming import prepared

SOURCE_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
FORMS_AHEAD = 2  # matrices whose zero points and remainders are computed before they are placed
INLINE_BYTES = 1024  # graph constants (axes, shapes) up to here stay in model.onnx; larger ones go to the data file


class Rewriter:
    """Runs once over one model. `forms` then says how each quantized module was written."""

    def __init__(self, model: ir.Model, checkpoint: CanonicalCheckpoint, data: DataFile, accuracy_level: int) -> None:
        self.graph, self.checkpoint, self.data = model.graph, checkpoint, data
        self.accuracy_level = accuracy_level
        self.forms: dict[str, WrittenForm] = {}
        self.carried: list[str] = []  # other tensors, by checkpoint name
        self.embeddings: dict[str, WrittenForm] = {}  # those of them that stay in blocks, by module
        self.constants: dict[str, NDArray[Any]] = {}  # large ones of the graph itself
        self._products = Products(model.graph, accuracy_level, self._constant)
        modules = [name for value in self.weights() if (name := _module(value)) in checkpoint.modules]
        self._forms = prepared(self._form, modules, ahead=FORMS_AHEAD)

    def close(self) -> None:
        """Nothing more is placed, whether everything was or not."""
        self._forms.close()

    def weights(self) -> list[ir.Value]:
        """The initializers of the graph in its own order: the work list, one tensor each."""
        return list(self.graph.initializers.values())

    def place(self, value: ir.Value) -> None:
        """Give one initializer its data. Raises InputError when checkpoint and graph do not belong together."""
        name = value.name or ""
        module = _module(value)
        if value.const_value is not None:
            self._place_constant(value, value.const_value.numpy())
        elif module in self.checkpoint.modules:
            self._place_quantized(value, module)
        elif module in self.checkpoint.embeddings and self._fits_blocks(value, module):
            self._place_embedding(value, module)
        elif name in self.checkpoint:
            self._place_other(value, name)
        else:
            raise InputError(
                "the graph needs a tensor that the checkpoint does not hold",
                where=name,
                fix="is the checkpoint complete? does config.json belong to it?",
            )

    def finish(self) -> None:
        """Check that every tensor of the checkpoint arrived, and order the graph."""
        lost = [module for module in self.checkpoint.modules if module not in self.forms]
        lost += [name for name in exported_names(self.checkpoint) if name not in self.carried]
        if lost:
            raise InputError(
                f"the ONNX graph has no place for {len(lost)} tensors of the checkpoint",
                where=lost[0],
                why="leaving them out would change the function",
                fix="this variant of the architecture needs a family of its own",
            )
        self.graph.sort()

    def _place_constant(self, value: ir.Value, array: NDArray[Any]) -> None:
        if array.nbytes > INLINE_BYTES:
            self.constants[value.name or ""] = array
            value.const_value = self.data.add(value.name or "", array)

    def _place_other(self, value: ir.Value, name: str) -> None:
        """Embeddings, norms, biases, lm_head: source bytes, cast to float32 after the Gather or before the use."""
        array = self.checkpoint.tensor(name)
        if ir.DataType.from_numpy(array.dtype) not in SOURCE_DTYPES:
            raise InputError(f"a {array.dtype} tensor has no place in the graph", where=name)
        _check_shape(value, array.shape)
        value.const_value = self.data.add(name, array)
        self.carried.append(name)
        if value.const_value.dtype == FLOAT:
            return
        value.type = ir.TensorType(value.const_value.dtype)
        uses = list(value.uses())
        for node in {use.node for use in uses if use.node.op_type == "Gather" and use.idx == 0}:
            self._cast_behind(node, value.const_value.dtype)
        others = [use for use in uses if use.node.op_type != "Gather"]
        if others:
            cast = to_float(value, f"{name}/Cast")
            self.graph.insert_before(self.graph[0], cast)
            for use in others:
                use.node.replace_input_with(use.idx, cast.outputs[0])

    def _cast_behind(self, gather: ir.Node, dtype: ir.DataType) -> None:
        """Gather rows in the source dtype, then cast: the table is never widened as a whole."""
        rows = gather.outputs[0]
        uses = list(rows.uses())
        rows.type = ir.TensorType(dtype)
        cast = to_float(rows, f"{gather.name}/Cast")
        self.graph.insert_after(gather, cast)
        for use in uses:
            use.node.replace_input_with(use.idx, cast.outputs[0])

    def _form(self, module: str) -> SplitForm:
        bits, _ = self.checkpoint.modules[module]
        matrix = self.checkpoint.packed(module)
        return choose_form(bits, matrix.scale, matrix.offset, where=module)

    def _place_quantized(self, value: ir.Value, module: str) -> None:
        bits, group_size = self.checkpoint.modules[module]
        matrix = self.checkpoint.packed(module)
        out, groups = matrix.scale.shape
        _check_shape(value, (out, groups * group_size))
        form = next(self._forms)
        self.forms[module] = WrittenForm.of(form)
        weights = self._stored(module, to_blocks(matrix.codes, bits, groups), matrix.scale, form)
        self._products.replace(
            [use.node for use in value.uses()], module, form.container, weights, (out, groups, group_size)
        )
        self.graph.initializers.pop(value.name or "")

    def _stored(
        self, module: str, codes: NDArray[np.uint8], scale: NDArray[Any], form: SplitForm
    ) -> dict[str, ir.Value]:
        """The tensors of a matrix, by their last names; zero_points and remainder where there are any."""
        tensors = {"codes": codes, "scale": scale}
        tensors |= {"zero_points": zero_points(form)} if form.explicit_zero else {}
        tensors |= {} if form.remainder is None else {"remainder": form.remainder}
        return {part: self._initializer(f"{module}.{part}", array) for part, array in tensors.items()}

    def _fits_blocks(self, value: ir.Value, module: str) -> bool:
        """Any embedding; where lm_head reads it too, one in bytes (tied_head.py)."""
        bits, *_ = self.checkpoint.embeddings[module]
        return ELEMENT_BITS[bits] == TIED_BITS or all(map(_gathers, value.uses()))

    def _place_embedding(self, value: ir.Value, module: str) -> None:
        """Codes that stay codes: every Gather becomes one of blocks, with the rest of the offset where there is any."""
        matrix = self.checkpoint.packed(module)
        _check_shape(value, matrix.shape)
        form = embedding_form(matrix, where=module)
        weights = self._stored(module, element_codes(matrix), matrix.scale, form)
        scale = self._wide(weights["scale"], module)
        self._place_head(value, module, form, weights)
        for gather in [use.node for use in value.uses()]:
            zeros = [weights["zero_points"]] if "zero_points" in weights else []
            found = ir.node(
                "GatherBlockQuantized",
                [weights["codes"], gather.inputs[1], scale, *zeros],
                {"bits": form.container, "block_size": matrix.group_size, "gather_axis": 0, "quantize_axis": 1},
                domain=MICROSOFT,
                name=f"{module}/GatherBlockQuantized",
            )
            nodes = [found]
            if "remainder" in weights:
                nodes += self._group_by_group(module, found.outputs[0], weights["remainder"], gather, matrix.shape[1])
            ir.convenience.replace_nodes_and_values(
                self.graph, gather, [gather], nodes, [gather.outputs[0]], [nodes[-1].outputs[0]]
            )
        self.graph.initializers.pop(value.name or "")
        self.embeddings[module] = WrittenForm.of(form)
        self.carried.append(f"{module}.weight")

    def _place_head(self, value: ir.Value, module: str, form: SplitForm, weights: dict[str, ir.Value]) -> None:
        """Where lm_head reads the embedding: its blocks too, or the float32 matrix made of them (tied_head.py)."""
        heads = [use.node for use in value.uses() if not _gathers(use)]
        out, width = self.checkpoint.entry(f"{module}.weight").shape
        group_size = self.checkpoint.embeddings[module][1]
        if heads and self.accuracy_level != EXACT_LEVEL and (form.remainder is None or not form.remainder.any()):
            shape = (out, width // group_size, group_size)
            sizes = self._constant(f"{module}{BLOCKS}/shape", np.array(shape, np.int64))
            blocks = ir.node("Reshape", [weights["codes"], sizes], name=f"{module}{BLOCKS}")
            blocks.outputs[0].name = f"{module}{BLOCKS}"
            self.graph.insert_before(self.graph[0], blocks)
            parts = {name: made for name, made in weights.items() if name != "remainder"}
            self._products.replace(heads, HEAD, form.container, parts | {"codes": blocks.outputs[0]}, shape)
        elif heads:
            chain = table_of(module, {part: made.name or "" for part, made in weights.items()}, width, group_size)
            made = {made.name or "": made for made in weights.values()}
            made |= {name: self._constant(name, array) for name, array in chain.constants.items()}
            for step in chain.steps:
                node = ir.node(step.operator, [made[name] for name in step.inputs], step.attributes, name=step.output)
                self.graph.insert_before(self.graph[0], node)
                node.outputs[0].name, made[step.output] = step.output, node.outputs[0]
            for node in heads:
                node.replace_input_with(list(node.inputs).index(value), made[chain.steps[-1].output])

    def _group_by_group(
        self, module: str, found: ir.Value, remainder: ir.Value, gather: ir.Node, width: int
    ) -> list[ir.Node]:
        """Nodes of found (batch, sequence, in) + the rows of R (in/g) of the same ids, one number for each group."""
        name, group_size = f"{module}/remainder", self.checkpoint.embeddings[module][1]
        groups = width // group_size
        grouped = self._constant(f"group_shape_{groups}x{group_size}", np.array([0, 0, groups, group_size], np.int64))
        flat = self._constant(f"row_shape_{width}", np.array([0, 0, width], np.int64))
        last = self._constant("group_axis", np.array([3], np.int64))
        nodes = [ir.node("Gather", [remainder, gather.inputs[1]], {"axis": 0}, name=f"{name}/Gather")]
        nodes += [to_float(nodes[0].outputs[0], f"{name}/Cast")] if remainder.dtype != FLOAT else []
        nodes.append(ir.node("Unsqueeze", [nodes[-1].outputs[0], last], name=f"{name}/Unsqueeze"))
        blocks = ir.node("Reshape", [found, grouped], name=f"{name}/Reshape")
        total = ir.node("Add", [blocks.outputs[0], nodes[-1].outputs[0]], name=f"{name}/Add")
        return [*nodes, blocks, total, ir.node("Reshape", [total.outputs[0], flat], name=f"{name}/Flatten")]

    def _wide(self, stored: ir.Value, module: str) -> ir.Value:
        """As float32; the cast is constant-folded when the session starts."""
        if stored.dtype == FLOAT:
            return stored
        cast = to_float(stored, f"{module}/{(stored.name or '').rpartition('.')[2]}/Cast")
        self.graph.insert_before(self.graph[0], cast)
        return cast.outputs[0]

    def _constant(self, name: str, array: NDArray[Any] | np.generic) -> ir.Value:
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        return self._register(name, ir.tensor(np.asarray(array), name=name), np.shape(array))

    def _initializer(self, name: str, array: NDArray[Any]) -> ir.Value:
        return self._register(name, self.data.add(name, array), array.shape)

    def _register(self, name: str, tensor: ir.TensorProtocol, shape: tuple[int, ...]) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value


def _gathers(use: Any) -> bool:
    """Whether rows are gathered from the value; something else that reads an embedding is lm_head."""
    return bool(use.node.op_type == "Gather" and use.idx == 0)


def _module(value: ir.Value) -> str:
    return (value.name or "").removesuffix(".weight")


def _check_shape(value: ir.Value, shape: Iterable[int]) -> None:
    expected = tuple(value.shape.numpy()) if value.shape is not None else ()
    if expected != tuple(shape):
        raise InputError(
            f"tensor is {tuple(shape)}, config.json makes it {expected}",
            where=value.name,
            why="config.json and weights disagree",
            fix="fetch the model again",
        )
