"""Which module of a decoder a product is, by what it feeds, in graphs whose tool kept no name of it.

torch.onnx's dynamo exporter names a transposed weight `val_102`, and quantizers drop the scopes that it notes beside
the nodes. The wiring of a decoder tells all the same:

    k_proj, v_proj    reach present.N.key and present.N.value of the KV cache, before any other product
    q_proj            reads what they read
    o_proj            follows products of that layer only
    gate_proj         passes an activation on the way to the next product, up_proj does not; down_proj follows both
    lm_head           reaches the logits
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

PRESENT = re.compile(r"^present\w*\.(\d+)\.(key|value)$")
ACTIVATIONS = frozenset({"Sigmoid", "Tanh", "Erf", "Gelu", "FastGelu", "QuickGelu", "Swish"})
PROJECTIONS = {("key",): "k_proj", ("value",): "v_proj", ("key", "value"): "qkv_proj"}
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "qkv_proj"), ("gate_proj", "up_proj", "gate_up_proj")
# Of operators that are a whole attention: input -> what it is a part of: the result, the keys kept, the values kept.
WHOLE_ATTENTION = ("GroupQueryAttention", "MultiHeadAttention")
PACKED, APART = {0: (0, 1, 2)}, {0: (0,), 1: (0, 1), 2: (0, 2)}
Place = tuple[int, str]  # layer, module in it


def places(model: onnx.ModelProto, products: Sequence[onnx.NodeProto]) -> dict[str, str]:
    """A product's output -> its module in Transformers. products: all with a constant matrix, in the graph's order.

    What the wiring does not tell is left out.
    """
    wires = _Wires(model, products)
    found = dict[str, Place]()
    heads = set[str]()
    for node in products:
        layers, kinds = wires.in_cache(node)
        if len(layers) == 1:
            found[node.output[0]] = (min(layers), PROJECTIONS[kinds])
        elif not layers and wires.reaches_logits(node):
            heads.add(node.output[0])
    inputs = {node.input[0]: found[node.output[0]][0] for node in products if node.output[0] in found}
    for node in products:
        if node.output[0] not in found and node.input[0] in inputs:
            found[node.output[0]] = (inputs[node.input[0]], "q_proj")
    siblings = Counter(node.input[0] for node in products)
    for node in products:
        if node.output[0] not in {*found, *heads}:
            place = _behind(wires, node, found, alone=siblings[node.input[0]] == 1)
            if place is not None:
                found[node.output[0]] = place
    named = {name: f"model.layers.{layer}.{_block(leaf)}.{leaf}" for name, (layer, leaf) in found.items()}
    return named | dict.fromkeys(heads, "lm_head")


def _behind(wires: _Wires, node: onnx.NodeProto, found: Mapping[str, Place], *, alone: bool) -> Place | None:
    """By the products before it, whose places are known. alone: no other product reads what it reads."""
    before = [found[name] for name in wires.before(node) if name in found]
    leaves, layers = {leaf for _, leaf in before}, {layer for layer, _ in before}
    if before and len(layers) == 1 and leaves <= {*ATTENTION}:
        return min(layers), "o_proj"
    if before and len(layers) == 1 and leaves <= {*MLP}:
        return min(layers), "down_proj"
    behind = [layer for layer, leaf in before if leaf == "o_proj"]
    if not behind:
        return None
    gate = "gate_up_proj" if alone else "gate_proj"
    return max(behind), gate if wires.passes_activation(node) else "up_proj"


def _block(leaf: str) -> str:
    return "mlp" if leaf in (*MLP, "down_proj") else "self_attn"


def _made_of(node: onnx.NodeProto, place: int) -> list[str]:
    """The outputs of a node that an input goes into."""
    if node.op_type == "DynamicQuantizeLinear":
        return list(node.output[:1])  # its step and zero go round the product that reads its codes
    if node.op_type in WHOLE_ATTENTION:
        parts = APART if len(node.input) > 2 and node.input[1] else PACKED
        return [node.output[part] for part in parts.get(place, ()) if part < len(node.output)]
    return list(node.output)


def walk(start: Iterable[str], onwards: Callable[[str], Iterable[str]]) -> Iterator[str]:
    """Every value of a graph that is reached from `start`, once each, whatever cycles it has."""
    open_, seen = list(start), set[str]()
    while open_:
        name = open_.pop()
        if name not in seen:
            seen.add(name)
            yield name
            open_ += onwards(name)


class _Wires:
    """From product to product. A walk ends at a product's output, or at the graph's."""

    def __init__(self, model: onnx.ModelProto, products: Iterable[onnx.NodeProto]) -> None:
        self._products = {node.output[0] for node in products}
        self._outputs = {value.name for value in model.graph.output}
        self._readers = defaultdict[str, list[tuple[str, str]]](list)  # value -> (operator, what it makes)
        self._made_of = defaultdict[str, list[str]](list)
        for node in model.graph.node:
            for place, name in enumerate(node.input):
                for output in _made_of(node, place) if name else ():
                    self._readers[name].append((node.op_type, output))
                    self._made_of[output].append(name)
        self._after = cache(self._walked)

    def in_cache(self, node: onnx.NodeProto) -> tuple[set[int], tuple[str, ...]]:
        """(layers of the KV cache that it reaches, what of them)."""
        found = [match for name in self._after(node.output[0])[0] if (match := PRESENT.match(name))]
        return {int(match[1]) for match in found}, tuple(sorted({match[2] for match in found}))

    def reaches_logits(self, node: onnx.NodeProto) -> bool:
        return any(not PRESENT.match(name) for name in self._after(node.output[0])[0])

    def passes_activation(self, node: onnx.NodeProto) -> bool:
        return bool(self._after(node.output[0])[1] & ACTIVATIONS)

    def before(self, node: onnx.NodeProto) -> set[str]:
        """Outputs of the products before it."""
        products = self._products
        reached = walk([node.input[0]], lambda name: () if name in products else self._made_of[name])
        return {name for name in reached if name in products}

    def _walked(self, output: str) -> tuple[set[str], set[str]]:
        """(the graph's outputs, operators) between a product's output and the next products."""
        operators = set[str]()

        def onwards(name: str) -> list[str]:
            steps = [(operator, made) for operator, made in self._readers[name] if made not in self._products]
            operators.update(operator for operator, _ in steps)
            return [made for _, made in steps]

        return {name for name in walk([output], onwards) if name in self._outputs}, operators
