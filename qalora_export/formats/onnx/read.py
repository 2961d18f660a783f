"""Read an exported folder back with the onnx package: canonical matrices and other tensors by checkpoint name.

Nothing here uses the writer's code for bytes or graphs: external data is loaded by onnx.external_data_helper, arrays
by onnx.numpy_helper, zero point and container come from the nodes, and codes are unpacked apart from grid.packing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.formats.onnx.embeddings import ELEMENT_BITS, GatheredBlocks, gathered_values
from qalora_export.formats.onnx.layout import graph_file
from qalora_export.formats.onnx.split_form import CONTAINER_BITS, from_blocks, offset_of
from qalora_export.formats.onnx.validate import read_model
from qalora_export.grid import GRIDS, GroupAffine, NamedGrid, PackedAffine, SuperBlockGrid, pack_codes
from qalora_export.safety import inside
from qalora_export.safety.limits import parse_json

if TYPE_CHECKING:
    import onnx

# JSON: module -> [bits, group_size], or [bits, group_size, grid] where scale and offset are float32 products instead of
# float16 numbers. A 3-bit code in a 4-bit container shows only here.
MODULES_KEY = "qalora.modules"
EMBEDDINGS_KEY = "qalora.embeddings"  # the same of embeddings that stay in blocks; in none of earlier versions
OFFSETS = ("remainder", "offset")  # how a file holds m: R = m + z·s, or, in earlier versions, m itself


@dataclass(frozen=True)
class OnnxContents:
    """A folder in the vocabulary of the checkpoint; tensors are loaded when asked for, one at a time.

    It is formats.contents.Contents, and: nodes: module name -> its MatMulNBits node; initializers: every tensor by
    name, data not loaded; metadata; grids: of modules on a grid of super-blocks, of which a folder has scales
    and offsets but not the levels. An implied offset is that of a symmetric matrix, −z·s. embeddings: those in blocks,
    plain float32 tensors to the caller, with bits and group size; gathers: their GatherBlockQuantized nodes.
    """

    folder: Path
    model: onnx.ModelProto
    metadata: dict[str, str]
    modules: dict[str, tuple[int, int]]
    nodes: dict[str, onnx.NodeProto]
    initializers: dict[str, onnx.TensorProto]
    grids: Mapping[str, NamedGrid] = field(default_factory=dict)
    embeddings: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    gathers: Mapping[str, onnx.NodeProto] = field(default_factory=dict)

    @property
    def data_folder(self) -> Path:
        """That of the graph, from which external data is named."""
        return graph_file(self.folder).parent

    @property
    def others(self) -> list[str]:
        """Checkpoint tensors end in .weight or .bias; the graph's own constants (axes, rotary tables) do not."""
        found = [name for name in self.initializers if name.endswith((".weight", ".bias"))]
        return [*found, *(f"{module}.weight" for module in self.embeddings)]

    @property
    def offset_is_implied(self) -> frozenset[str]:
        return frozenset(module for module in self.modules if self.stored_offset(module) is None)

    def stored_offset(self, module: str) -> str | None:
        """The tensor that the offset of a module comes from (OFFSETS); None where it is implied."""
        return next((name for part in OFFSETS if (name := f"{module}.{part}") in self.initializers), None)

    @cached_property
    def producers(self) -> dict[str, onnx.NodeProto]:
        """Value name -> the node that makes it."""
        return {name: node for node in self.model.graph.node for name in node.output}

    def ancestors(self, value: str, *, until: str = "") -> set[str]:
        """Names of the values that `value` is computed from, itself included, not going beyond `until`; tensors too."""
        found, waiting = set[str](), [value]
        while waiting:
            name = waiting.pop()
            if name and name != until and name not in found:
                found.add(name)
                waiting += self.producers[name].input if name in self.producers else []
        return found

    def offset_branch(self, module: str) -> tuple[str, str] | None:
        """What is added to the product of a module for its stored offset, and the sum; None where nothing is."""
        product, stored = self.nodes[module].output[0], self.stored_offset(module)
        for node in self.model.graph.node:
            if node.op_type == "Add" and product in node.input:
                branch = next((name for name in node.input if name != product), "")
                if stored in self.ancestors(branch):
                    return branch, node.output[0]
        return None

    @property
    def opaque(self) -> dict[str, str]:
        return {}

    @property
    def optional(self) -> frozenset[str]:
        return frozenset()

    def shape(self, name: str) -> tuple[int, ...]:
        """(out, in) of a module, by its codes, or the shape of another tensor."""
        if (module := self._embedding(name)) is not None:
            rows, width = (list(self.initializers[f"{module}.codes"].dims) + [0, 0])[:2]
            return rows, width * 8 // ELEMENT_BITS[self.embeddings[module][0]]
        if name not in self.modules:
            return tuple(self.initializers[name].dims)
        out, groups = (list(self.initializers[f"{name}.codes"].dims) + [0, 0])[:2]
        return out, groups * self.modules[name][1]

    def stored(self, name: str) -> tuple[str, int]:
        """dtype and bytes of a tensor that is not quantized."""
        import onnx

        if (module := self._embedding(name)) is not None:
            stored = (t for n, t in self.initializers.items() if n.rpartition(".")[0] == module)
            size = sum(int(e.value) for t in stored for e in t.external_data if e.key == "length")
            return f"{self.embeddings[module][0]} bit, g {self.embeddings[module][1]}", size
        dtype = onnx.helper.tensor_dtype_to_np_dtype(self.initializers[name].data_type)
        return dtype.name, math.prod(self.shape(name)) * dtype.itemsize

    def carried(self, name: str, tensor: NDArray[Any]) -> NDArray[Any]:
        """What the folder must hold for a plain tensor of the checkpoint: the same."""
        return tensor

    @property
    def accuracy_level(self) -> int | None:
        """That of the MatMulNBits nodes; None when they disagree or there are none."""
        levels = {integers_of(node).get("accuracy_level", 0) for node in self.nodes.values()}
        return levels.pop() if len(levels) == 1 else None

    def tensor(self, name: str, rows: slice = slice(None)) -> NDArray[Any]:
        """Some rows of one initializer, in its stored dtype, read from the data file. Raises InputError when absent."""
        import onnx
        from onnx.external_data_helper import load_external_data_for_tensor

        if (module := self._embedding(name)) is not None:
            return self._gathered(module, rows)
        if name not in self.initializers:
            raise InputError(f"the model has no tensor {name!r}", where=self.folder)
        tensor = self.initializers[name]
        outside = tensor.data_location == onnx.TensorProto.EXTERNAL
        start, stop, _ = rows.indices(tensor.dims[0] if tensor.dims else 0)
        whole = (start, stop) == (0, tensor.dims[0] if tensor.dims else 0)
        if outside and not whole:
            return self._outside_rows(name, start, stop)
        copy = onnx.TensorProto()
        copy.CopyFrom(tensor)
        if outside:
            load_external_data_for_tensor(copy, str(self.data_folder))
        found: NDArray[Any] = onnx.numpy_helper.to_array(copy)
        return found if whole else found[rows]

    def _outside_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows of an external tensor, so that a large embedding need not be in memory as a whole."""
        import onnx

        tensor = self.initializers[name]
        entries = {entry.key: entry.value for entry in tensor.external_data}
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        row = math.prod(tensor.dims[1:])
        with inside(self.data_folder, entries["location"]).open("rb") as file:
            file.seek(int(entries.get("offset", "0")) + start * row * dtype.itemsize)
            raw = file.read((stop - start) * row * dtype.itemsize)
        return np.frombuffer(raw, dtype).reshape(stop - start, *tensor.dims[1:])

    def _embedding(self, name: str) -> str | None:
        """The embedding in blocks that a tensor is the weight of."""
        module = name.removesuffix(".weight")
        return module if module != name and module in self.embeddings else None

    def _gathered(self, module: str, rows: slice) -> NDArray[np.float32]:
        """Rows of an embedding in blocks, float32. Raises UnsafeInputError when node and tensors disagree."""
        return gathered_values(*self.embedding_parts(module, rows))

    def embedding_parts(
        self, module: str, rows: slice = slice(None)
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[Any], NDArray[Any] | None]:
        """codes (rows, in), z, scale, and R where there is one, (rows, groups), of an embedding in blocks."""
        bits, group_size = self.embeddings[module]
        shape, said = self.shape(f"{module}.weight"), integers_of(self.gathers[module])
        stored = (name for name in (f"{module}.scale", f"{module}.remainder") if name in self.initializers)
        codes, *numbers = (self.tensor(name, rows) for name in (f"{module}.codes", *stored))
        blocks = GatheredBlocks(ELEMENT_BITS[bits], group_size, shape[1] // group_size, f"{self.folder}: {module}")
        blocks.check(said, codes, numbers)
        zero = self._zeros(module, blocks.element_bits, (len(codes), blocks.groups), rows)
        scale, *rest = numbers
        return from_blocks(codes, blocks.element_bits), zero, scale, rest[0] if rest else None

    def group_affine(self, module: str) -> GroupAffine:
        """The quantized matrix of one module. Raises UnsafeInputError when node and tensors disagree."""
        blocks, scale, offset, bits = self._parts(module, slice(None))
        try:
            return GroupAffine(from_blocks(blocks, CONTAINER_BITS[bits]), scale, offset, bits)
        except InputError as error:
            raise UnsafeInputError(error.what, where=f"{self.folder}: {module}", why=error.why) from error

    def packed(self, module: str, rows: slice = slice(None)) -> PackedAffine:
        """Some rows of it with packed codes: a container's bytes are the packed ones. Errors as in group_affine."""
        blocks, scale, offset, bits = self._parts(module, rows)
        container = CONTAINER_BITS[bits]
        same = container == bits
        try:
            codes = blocks.reshape(len(blocks), -1) if same else pack_codes(from_blocks(blocks, container), bits)
            return PackedAffine(codes, scale, offset, bits, self.modules[module][1])
        except InputError as error:
            raise UnsafeInputError(error.what, where=f"{self.folder}: {module}", why=error.why) from error

    def _parts(self, module: str, rows: slice) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], int]:
        """Rows of codes (rows, groups, bytes), scale and offset (rows, groups), and bits; the node is checked."""
        where = f"{self.folder}: {module}"
        bits, group_size = self.modules[module]
        said = integers_of(self.nodes[module])
        shape = tuple(self.initializers[f"{module}.codes"].dims)
        container = CONTAINER_BITS[bits]
        expected = (said.get("N"), said.get("K", 0) // group_size, group_size * container // 8)
        if (said.get("bits", 4), said.get("block_size")) != (container, group_size) or shape != expected:
            raise UnsafeInputError(f"MatMulNBits says {said}, its codes are {shape}", where=where)
        blocks, scale = self.tensor(f"{module}.codes", rows), self.tensor(f"{module}.scale", rows)
        number = np.dtype(np.float32 if module in self.grids else np.float16)
        if blocks.dtype != np.uint8 or scale.shape != blocks.shape[:2] or scale.dtype != number:
            raise UnsafeInputError(f"codes are {blocks.dtype}, scale {scale.dtype}{scale.shape}", where=where)
        stored = self.stored_offset(module)
        if stored == f"{module}.offset":
            return blocks, scale, self._earlier_offset(module, rows, scale), bits
        rest = None if stored is None else self.tensor(stored, rows)
        if rest is not None and (rest.shape != scale.shape or rest.dtype not in (np.float16, np.float32)):
            raise UnsafeInputError(f"remainder is {rest.dtype}{rest.shape}, scale {scale.shape}", where=where)
        offset = offset_of(scale, self._zeros(module, container, scale.shape, rows), rest, where=where)
        return blocks, scale, offset, bits

    def _earlier_offset(self, module: str, rows: slice, scale: NDArray[Any]) -> NDArray[np.float16]:
        """m as folders of earlier versions hold it; their graph adds one z·s per matrix."""
        offset = self.tensor(f"{module}.offset", rows)
        if offset.shape != scale.shape or offset.dtype != np.float16:
            raise UnsafeInputError(
                f"offset is {offset.dtype}{offset.shape}, scale {scale.shape}", where=f"{self.folder}: {module}"
            )
        return offset

    def matrices(self) -> Iterator[tuple[str, GroupAffine]]:
        """(module, matrix), one in memory at a time."""
        for module in self.modules:
            yield module, self.group_affine(module)

    def zeros(self, module: str, rows: slice = slice(None)) -> NDArray[np.uint8]:
        """z (rows, groups) of some rows of a module."""
        out, groups = tuple(self.initializers[f"{module}.codes"].dims)[:2]
        container = CONTAINER_BITS[self.modules[module][0]]
        return self._zeros(module, container, (len(range(out)[rows]), groups), rows)

    def _zeros(self, module: str, container: int, shape: tuple[int, ...], rows: slice) -> NDArray[np.uint8]:
        """z (rows, groups) of a module: its zero_points, or MatMulNBits' default."""
        inputs = (self.nodes[module] if module in self.nodes else self.gathers[module]).input
        if len(inputs) < 4 or not inputs[3]:
            return np.full(shape, 2 ** (container - 1), np.uint8)
        packed = self.tensor(inputs[3], rows)
        if packed.dtype != np.uint8 or packed.shape != (shape[0], -(-shape[1] * container // 8)):
            raise UnsafeInputError(
                f"zero points are {packed.dtype}{packed.shape}, scale {shape}", where=f"{self.folder}: {module}"
            )
        return from_blocks(packed[:, None, :], container)[:, : shape[1]]


def read_back(folder: Path) -> OnnxContents:
    """Validate a folder and describe what it holds. Errors as in validate.read_model; InputError if it is not ours."""
    model = read_model(folder)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if MODULES_KEY not in metadata:
        raise InputError(
            "not a folder written by qalora-export",
            where=folder,
            why=f"no {MODULES_KEY} in its metadata",
            fix="run `qalora-export export onnx`",
        )
    (modules, grids), nodes = _declared(metadata, MODULES_KEY, folder), _readers(model, "MatMulNBits", 1)
    (embeddings, _), gathers = _declared(metadata, EMBEDDINGS_KEY, folder), _readers(model, "GatherBlockQuantized", 0)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    for module in (*modules, *embeddings):
        known = module in (nodes if module in modules else gathers)
        if not known or not {f"{module}.codes", f"{module}.scale"} <= set(initializers):
            raise UnsafeInputError("metadata names a module that the graph does not hold", where=f"{folder}: {module}")
    for module in embeddings:
        if module in modules or f"{module}.weight" in initializers:
            raise UnsafeInputError(
                "metadata names an embedding that the graph holds twice", where=f"{folder}: {module}"
            )
    return OnnxContents(folder, model, metadata, modules, nodes, initializers, grids, embeddings, gathers)


def integers_of(node: onnx.NodeProto) -> dict[str, int]:
    """The integer attributes of a node."""
    import onnx

    return {a.name: int(a.i) for a in node.attribute if a.type == onnx.AttributeProto.INT}


def _readers(model: onnx.ModelProto, kind: str, place: int) -> dict[str, onnx.NodeProto]:
    """The node of that kind of every matrix, found by the name of its codes, input number `place`."""
    nodes = [node for node in model.graph.node if node.op_type == kind and len(node.input) > 2]
    return {node.input[place].removesuffix(".codes"): node for node in nodes if node.input[place].endswith(".codes")}


def _declared(
    metadata: dict[str, str], key: str, folder: Path
) -> tuple[dict[str, tuple[int, int]], dict[str, NamedGrid]]:
    """module -> (bits, group_size), and the grids of those that are on one of super-blocks; nothing without the key."""
    raw = parse_json(metadata.get(key, "{}").encode(), where=f"{folder}: {key}")
    if not isinstance(raw, dict) or not all(_is_entry(value) for value in raw.values()):
        raise UnsafeInputError(f"{key} holds impossible bits or group sizes", where=folder)
    grids = {name: GRIDS[entry[2]] for name, entry in raw.items() if len(entry) > 2}
    return {name: (entry[0], entry[1]) for name, entry in raw.items()}, grids


def _is_entry(value: object) -> bool:
    if not isinstance(value, list) or len(value) not in (2, 3) or not all(type(number) is int for number in value[:2]):
        return False
    if len(value) == 3 and not isinstance(GRIDS.get(value[2]) if isinstance(value[2], str) else None, SuperBlockGrid):
        return False
    return value[0] in CONTAINER_BITS and value[1] > 0
