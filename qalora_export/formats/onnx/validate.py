"""An ONNX folder is untrusted input: checked before a runtime, or we, read a byte of its weights.

Checked: size of the graph; every tensor's dims, dtype and byte count; external data stays inside the folder, is no
link and lies inside its file; names are unique; operators are the runtime's own; genai_config.json holds no key that
could make a runtime load code or touch other files (genai_config.py).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.formats.onnx.genai_config import check_genai_config
from qalora_export.formats.onnx.genai_text.files import MODULE, MODULE_KEYS, OWN, OWN_KEY
from qalora_export.formats.onnx.layout import GENAI_CONFIG, TOKENIZER_CONFIG, graph_file
from qalora_export.safety import inside, read_json

if TYPE_CHECKING:
    import onnx
    from google.protobuf.message import Message

MAX_MODEL_BYTES = 2**31 - 1  # protobuf's own limit
MAX_INLINE_BYTES = 64 * 2**20  # weights live in the data file; an inline tensor is an axis, a shape, a small table
MAX_ELEMENTS = 2**40
EXTERNAL_KEYS = {"location", "offset", "length", "checksum"}
STANDARD = {"", "ai.onnx"}
DOMAINS = {*STANDARD, "com.microsoft"}  # what a stock ONNX Runtime has; any other needs a custom-op library
# ONNX Runtime's quantizers import every domain that it registers itself, needed or not; nodes of these are refused.
IMPORTED = {
    *DOMAINS,
    *("ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview", "ai.onnx.preview.training"),
    *("com.microsoft.experimental", "com.microsoft.nchwc", "com.ms.internal.nhwc", "org.pytorch.aten"),
}
FORBIDDEN_OPERATORS = {("com.microsoft", "EPContext")}  # names a compiled binary beside the model
FORBIDDEN_METADATA = {"ort_config"}  # session options inside the model


def read_model(folder: Path) -> onnx.ModelProto:
    """The graph of a checked folder, weights not loaded.

    Raises InputError when the folder is incomplete or does not parse, UnsafeInputError when it lies or escapes.
    """
    path = graph_file(folder)
    if path.stat().st_size > MAX_MODEL_BYTES:
        raise UnsafeInputError(f"{path.name} has {path.stat().st_size} bytes", where=path, why="protobuf ends at 2 GiB")
    model = parse_model(path.read_bytes(), where=path)
    _check_code(model, path)
    names = set()
    for tensor in _tensors(model):
        check_tensor(tensor, path.parent)
    for tensor in model.graph.initializer:
        if tensor.name in names:
            raise UnsafeInputError("two initializers share a name", where=f"{path}: {tensor.name}")
        names.add(tensor.name)
    if (folder / GENAI_CONFIG).exists():
        check_genai_config(read_json(inside(folder, GENAI_CONFIG)), folder / GENAI_CONFIG)
    _check_tokenizer_overrides(folder)
    return model


def _check_tokenizer_overrides(folder: Path) -> None:
    """GenAI opens the file that `tiktoken_file` names: it must be the one that we write. Raises UnsafeInputError."""
    for name in (MODULE, TOKENIZER_CONFIG):
        found = read_json(inside(folder, name)) if os.path.lexists(folder / name) else {}
        keys = set(found) if isinstance(found, dict) else {"the whole file"}
        odd = keys - MODULE_KEYS if name == MODULE else keys & {OWN_KEY}
        if odd or not all(isinstance(found[key], str) for key in keys & MODULE_KEYS if name == MODULE):
            raise UnsafeInputError(
                f"{min(odd, default='a value')} is not what we write there",
                where=folder / name,
                why="ONNX Runtime GenAI may open other files on its behalf",
                fix="remove it, or export the folder again",
            )
        if name == MODULE and found.get(OWN_KEY, OWN) != OWN:
            raise UnsafeInputError(
                f"{OWN_KEY} is {found[OWN_KEY][:80]!r}", where=folder / name, why=f"only {OWN} may be"
            )
    if os.path.lexists(folder / OWN):
        inside(folder, OWN)


def parse_model(raw: bytes, *, where: object) -> onnx.ModelProto:
    """Protobuf bytes -> ModelProto. Raises InputError."""
    import onnx
    from google.protobuf.message import DecodeError

    model = onnx.ModelProto()
    try:
        model.ParseFromString(raw)
    except DecodeError as error:
        raise InputError("not an ONNX model", where=where, why=str(error), fix="export or fetch it again") from error
    if not model.graph.node:
        raise InputError("the ONNX model holds no graph", where=where, why="truncated?", fix="export it again")
    _check_text(model, where)
    return model


def _check_text(message: Message, where: object) -> None:
    """Names must be UTF-8: protobuf hands out anything else as bytes, and readers disagree about them."""
    for field, value in message.ListFields():
        items = value if _is_sequence(value) else [value]
        if field.type == field.TYPE_STRING and any(isinstance(item, bytes) for item in items):
            raise UnsafeInputError(f"{field.full_name} is not UTF-8", where=where, fix="export it again")
        if field.type == field.TYPE_MESSAGE:
            for item in items:
                _check_text(item, where)


def _is_sequence(value: object) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, (str, bytes))


def check_tensor(tensor: onnx.TensorProto, folder: Path) -> None:
    """Raise UnsafeInputError unless dims, dtype and stored bytes agree and external data lies inside `folder`.

    folder: that of the graph, which external data is named from.
    """
    import onnx

    where = f"{folder}: {tensor.name}"
    if tensor.HasField("segment"):
        raise UnsafeInputError("segmented tensors have no place in a decoder", where=where)
    if any(dim < 0 for dim in tensor.dims) or math.prod(tensor.dims) > MAX_ELEMENTS:
        raise UnsafeInputError(f"tensor claims shape {list(tensor.dims)}", where=where)
    expected = _nbytes(tensor, where)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        _check_external(tensor, expected, folder, where)
        return
    if expected > MAX_INLINE_BYTES:
        raise UnsafeInputError(f"a tensor of {expected} bytes is stored inside the graph", where=where)
    if tensor.HasField("raw_data"):
        if len(tensor.raw_data) != expected:
            raise UnsafeInputError(
                f"tensor holds {len(tensor.raw_data)} bytes, its shape needs {expected}", where=where
            )
        return
    field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
    if len(getattr(tensor, field)) != math.prod(tensor.dims):
        raise UnsafeInputError(f"tensor does not hold the values of shape {list(tensor.dims)}", where=where)


def _nbytes(tensor: onnx.TensorProto, where: str) -> int:
    import onnx

    if tensor.data_type == onnx.TensorProto.STRING:
        raise UnsafeInputError("a tensor of strings has no place in a decoder", where=where)
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    except (KeyError, ValueError, TypeError) as error:
        raise UnsafeInputError(f"tensor has unknown data type {tensor.data_type}", where=where) from error
    packed = {"int4": 4, "uint4": 4, "float4_e2m1fn": 4, "int2": 2, "uint2": 2}.get(dtype.name, 8 * dtype.itemsize)
    return int(-(-math.prod(tensor.dims) * packed // 8))


def _check_external(tensor: onnx.TensorProto, expected: int, folder: Path, where: str) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if len(entries) != len(tensor.external_data) or not {"location", "length"} <= set(entries) <= EXTERNAL_KEYS:
        raise UnsafeInputError("external data entry is malformed", where=where, why=str(list(entries))[:200])
    path = inside(folder, entries["location"])
    numbers = [entries.get("offset", "0"), entries["length"]]
    if not all(number.isascii() and number.isdigit() and len(number) < 19 for number in numbers):
        raise UnsafeInputError(f"external data offset or length is no number: {numbers}", where=where)
    offset, length = map(int, numbers)
    if length != expected:
        raise UnsafeInputError(f"external data has {length} bytes, the shape needs {expected}", where=where)
    if offset + length > path.stat().st_size:
        raise UnsafeInputError(
            f"external data ends at byte {offset + length} of {path.stat().st_size}",
            where=where,
            why="truncated, or the offset lies",
            fix="export or fetch the folder again",
        )


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor anywhere: initializers, node attributes, sub-graphs, functions. Refuses sparse ones."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _node_tensors(node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    if graph.sparse_initializer:
        raise UnsafeInputError("sparse initializers have no place in a decoder", where=graph.name)
    yield from graph.initializer
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
            raise UnsafeInputError("sparse tensors have no place in a decoder", where=node.name)
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            yield from _graph_tensors(graph)


def _check_code(model: onnx.ModelProto, where: object) -> None:
    """Operators that the runtime brings itself, or that the model spells out with those; nothing that reads a file."""
    if model.training_info:
        raise UnsafeInputError("training graphs have no place in a decoder", where=where)
    if odd := sorted({entry.key for entry in model.metadata_props} & FORBIDDEN_METADATA):
        raise UnsafeInputError(f"metadata sets {odd[0]}", where=where, why="it configures the runtime")
    local = {(function.domain, function.name) for function in model.functions}
    if len(local) != len(model.functions) or any(domain in STANDARD for domain, _ in local):
        raise UnsafeInputError("a function is repeated or redefines a standard operator", where=where)
    for opset in [*model.opset_import, *(opset for function in model.functions for opset in function.opset_import)]:
        if opset.domain not in IMPORTED | {domain for domain, _ in local}:
            raise UnsafeInputError(f"operators of {opset.domain!r} need a library of native code", where=where)
    for function in model.functions:
        if any((node.domain, node.op_type) in local for node in _all_nodes(function.node)):
            raise UnsafeInputError("a function calls a function", where=f"{where}: {function.name}")
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    for node in _all_nodes(nodes):
        kind = (node.domain, node.op_type)
        if kind not in local and (node.domain not in DOMAINS or kind in FORBIDDEN_OPERATORS):
            raise UnsafeInputError(
                f"operator {node.domain}:{node.op_type} needs native code or files beside the model",
                where=f"{where}: {node.name}",
            )


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """These nodes and, at any depth, those of their sub-graphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _all_nodes(graph.node)
