"""What differs between two ONNX graphs, whatever kind of thing it is: found by walking the messages themselves.

Lists of things with names (nodes by their first output, tensors, attributes, inputs, metadata) are matched by name, so
their order does not count, except that of a graph's inputs and outputs. Fields that onnx.proto does not define, which
a newer reader might act on, are differences too. Only notes for people (doc_string) are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qalora_export.checkpoint.differences import ABSENT, clip, explain

if TYPE_CHECKING:
    import onnx
    from google.protobuf.message import Message

NOTES = {"doc_string"}
KEYS: Mapping[str, Callable[[Any], str]] = {
    "AttributeProto": lambda message: message.name,
    "FunctionProto": lambda message: f"{message.domain}:{message.name}:{message.overload}",
    "NodeProto": lambda message: next((f"{message.op_type} {name}" for name in message.output if name), message.name),
    "OperatorSetIdProto": lambda message: message.domain or "ai.onnx",
    "StringStringEntryProto": lambda message: message.key,
    "TensorProto": lambda message: message.name,
    "ValueInfoProto": lambda message: message.name,
}
# Where the numbers of an initializer lie, and the numbers: compared as numbers.
STORAGE = {"data_location", "external_data", "raw_data"}
INITIALIZER = "graph.initializer "


def graph_differences(
    expected: onnx.ModelProto, found: onnx.ModelProto, *, tensors: Callable[[str], str | None]
) -> Iterator[str]:
    """One line for each difference. tensors: name of an initializer that both have -> how its numbers differ, if so."""
    yield from _differences(expected, found, "")
    for name in ("input", "output"):
        orders = [[value.name for value in getattr(model.graph, name)] for model in (expected, found)]
        if orders[0] != orders[1]:
            yield f"graph.{name}: {explain(*orders)}"
    there = {tensor.name for tensor in found.graph.initializer}
    for tensor in expected.graph.initializer:
        if tensor.name in there and (line := tensors(tensor.name)):
            yield f"initializer {tensor.name}: {line}"


def size_of(model: onnx.ModelProto) -> int:
    """How many things of a graph are compared: nodes, their attributes and edges, tensors, inputs, outputs, opsets."""
    graph = model.graph
    nodes = sum(1 + len(node.attribute) + len(node.input) + len(node.output) for node in graph.node)
    others = (graph.initializer, graph.input, graph.output, model.opset_import, model.metadata_props)
    return nodes + sum(map(len, others))


def _differences(expected: Message, found: Message, place: str) -> Iterator[str]:
    """place: dotted names of the fields that lead here, with the names of the things in lists."""
    from google.protobuf.unknown_fields import UnknownFieldSet

    if len(UnknownFieldSet(found)):
        yield f"{place or 'model'}: a field that onnx.proto does not define"
    left, right = _fields(expected, place), _fields(found, place)
    for name in sorted({*left, *right} - NOTES):
        inner = f"{place}.{name}" if place else name
        if name not in left or name not in right:
            kind = (left | right)[name][0]
            if kind.type == kind.TYPE_MESSAGE and _repeated((left | right)[name][1]):
                yield from _items(left.get(name, (kind, ()))[1], right.get(name, (kind, ()))[1], inner)
            else:
                yield f"{inner}: expected {_shown(left.get(name))}, found {_shown(right.get(name))}"
            continue
        (kind, want), (_, got) = left[name], right[name]
        if kind.type == kind.TYPE_MESSAGE:
            yield from _items(want, got, inner) if _repeated(want) else _differences(want, got, inner)
        elif _repeated(want):
            if list(want) != list(got):
                yield f"{inner}: {explain(list(want), list(got))}"
        elif want != got:
            yield f"{inner}: {explain(want, got)}"


def _fields(message: Message, place: str) -> dict[str, tuple[Any, Any]]:
    """Set fields by name, without an initializer's STORAGE."""
    left_out = STORAGE if place.startswith(INITIALIZER) and message.DESCRIPTOR.name == "TensorProto" else set[str]()
    return {kind.name: (kind, value) for kind, value in message.ListFields() if kind.name not in left_out}


def _items(expected: Iterable[Message], found: Iterable[Message], place: str) -> Iterator[str]:
    left, right = _by_key(expected), _by_key(found)
    for key in (*left, *(key for key in right if key not in left)):
        title = f"{place} {key}"
        if key not in left:
            yield f"{title}: in no fresh export"
        elif key not in right:
            yield f"{title}: missing"
        else:
            yield from _differences(left[key], right[key], title)


def _by_key(messages: Iterable[Message]) -> dict[str, Message]:
    """By name; what has none, or one that came before, by its number as well."""
    found: dict[str, Message] = {}
    for index, message in enumerate(messages):
        key_of = KEYS.get(message.DESCRIPTOR.name)
        key = key_of(message) if key_of else str(index)
        found[key if key not in found else f"{key} (number {index})"] = message
    return found


def _repeated(value: object) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, str | bytes)


def _shown(field: tuple[Any, Any] | None) -> str:
    return ABSENT if field is None else clip(list(field[1]) if _repeated(field[1]) else field[1])
