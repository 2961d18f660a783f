"""Products without names are told by their wiring: in plain operators, with a fused attention, in any order."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from qalora_export.verify.foreign.onnx_places import places

SELF, MLP = "model.layers.{}.self_attn.{}_proj", "model.layers.{}.mlp.{}_proj"


class Decoder:
    """A decoder of two layers whose products are called by numbers. wanted: a product's output -> its module."""

    def __init__(self, *, fused: bool = False, packed: bool = False, rounded: bool = False) -> None:
        self.nodes = list[onnx.NodeProto]()
        self.products = list[onnx.NodeProto]()
        self.wanted = dict[str, str]()
        self.rounded = rounded
        value = self.node("Gather", "embedding", "ids")
        for layer in range(2):
            attention = self.fused(layer, value, packed=packed) if fused else self.plain(layer, value)
            value = self.node("Add", value, self.product(attention, SELF.format(layer, "o")))
            value = self.node("Add", value, self.mlp(layer, self.node("Mul", value, "norm"), packed=packed))
        logits = self.product(self.node("Mul", value, "norm"), "lm_head")
        self.node("Identity", logits, outputs=["logits"])

    def node(self, kind: str, *inputs: str, outputs: list[str] | None = None) -> str:
        outputs = outputs or [f"v{len(self.nodes)}"]
        self.nodes.append(helper.make_node(kind, inputs, outputs))
        return outputs[0]

    def product(self, x: str, module: str) -> str:
        """Its output; as quantize_dynamic writes it where it is rounded, with the step going round the product."""
        if not self.rounded:
            out = self.node("MatMul", x, "w")
        else:
            step, zero = f"step of {len(self.nodes)}", f"zero of {len(self.nodes)}"
            codes = f"codes of {x}"
            if not any(codes in node.output for node in self.nodes):
                self.node("DynamicQuantizeLinear", x, outputs=[codes, step, zero])
            made = next(node for node in self.nodes if codes in node.output)
            out = self.node("MatMulInteger", codes, "w", made.output[2])
        self.products.append(self.nodes[-1])
        self.wanted[out] = module
        return self.node("Mul", self.node("Cast", out), self.node("Mul", made.output[1], "s")) if self.rounded else out

    def plain(self, layer: int, value: str) -> str:
        normed = self.node("Mul", value, "norm")
        key = self.product(normed, SELF.format(layer, "k"))  # a tool may sort them otherwise
        query = self.product(normed, SELF.format(layer, "q"))
        held = self.product(normed, SELF.format(layer, "v"))
        key = self.node("Concat", f"past.{layer}.key", key, outputs=[f"present.{layer}.key"])
        held = self.node("Concat", f"past.{layer}.value", held, outputs=[f"present.{layer}.value"])
        return self.node("MatMul", self.node("Softmax", self.node("MatMul", query, key)), held)

    def fused(self, layer: int, value: str, *, packed: bool) -> str:
        normed = self.node("Mul", value, "norm")
        leaves = ["qkv"] if packed else ["q", "k", "v"]
        parts = [self.product(normed, SELF.format(layer, leaf)) for leaf in leaves]
        names = [f"{side}.{layer}.{part}" for side in ("past", "present") for part in ("key", "value")]
        inputs = [*parts, *[""] * (3 - len(parts)), *names[:2]]
        return self.node("GroupQueryAttention", *inputs, outputs=[f"attention {layer}", *names[2:]])

    def mlp(self, layer: int, value: str, *, packed: bool) -> str:
        if packed:
            both = self.product(value, MLP.format(layer, "gate_up"))
            gate, up = (self.node("Slice", both) for _ in range(2))
        else:
            up = self.product(value, MLP.format(layer, "up"))
            gate = self.product(value, MLP.format(layer, "gate"))
        product = self.node("Mul", self.node("Mul", gate, self.node("Sigmoid", gate)), up)
        return self.product(product, MLP.format(layer, "down"))

    @property
    def model(self) -> onnx.ModelProto:
        kept = [f"present.{layer}.{part}" for layer in range(2) for part in ("key", "value")]
        outputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("logits", *kept)]
        weight = numpy_helper.from_array(np.zeros((2, 2), np.float32), "w")
        return helper.make_model(helper.make_graph(self.nodes, "decoder", [], outputs, [weight]))


@pytest.mark.parametrize(
    "how", [{}, {"rounded": True}, {"fused": True}, {"fused": True, "packed": True}], ids=lambda how: ", ".join(how)
)
def test_every_product_is_told(how: dict[str, bool]) -> None:
    decoder = Decoder(**how)
    assert places(decoder.model, decoder.products) == decoder.wanted


def test_what_is_no_decoder_is_left_out() -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    outputs = [helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, None)]
    assert places(helper.make_model(helper.make_graph([node], "no decoder", [], outputs)), [node]) == {}
