"""Points of a decoder at which reference and runtime are compared, in the order of the data flow.

A point is the input or the output of a module, under its Transformers name. llama.cpp's names are those of its graph
builders (src/models/*.cpp, the second argument of `cb`); in an ONNX graph by mobius a value's name starts with the
module that made it, and residual sums are found by their place beside the norms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.models.families.family import EMBEDDING_NODE, LayerPoint, Side

if TYPE_CHECKING:
    import onnx

Activations = dict[str, NDArray[np.float32]]  # point key -> (positions, features)
Shown = Mapping[str, NDArray[np.float32]]  # the same, read when asked for
NORMS = ("RMSNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")
FIRST_NORM = ".input_layernorm"  # its input is the residual stream between layers
WITH_RESIDUAL = "SkipSimplifiedLayerNormalization"  # output 3 is the sum that was normalized


@dataclass(frozen=True, slots=True)
class Point:
    """module: Transformers name. side: which end of it. name, what: for the reader. node: llama.cpp's name.

    heads_first: as in LayerPoint.
    """

    module: str
    side: Side
    name: str
    what: str
    node: str
    heads_first: bool = False

    @property
    def key(self) -> str:
        return f"{self.module} {self.side}"


def value_of(output: Any) -> Any:
    """What a module answers: a tensor, a tuple that begins with it, or the whole model's output with its logits."""
    return output if hasattr(output, "shape") else output[0]


def model_points(layers: int, embedding: str = EMBEDDING_NODE) -> list[Point]:
    """What enters the first decoder layer, hidden state after every layer, final norm, logits.

    embedding: llama.cpp's node of the first.
    """
    return [
        Point("model.layers.0", "input", "model.embed_tokens", "embedding and its scale", embedding),
        *(_output(f"model.layers.{i}", f"hidden state after layer {i}", f"l_out-{i}") for i in range(layers)),
        _output("model.norm", "final norm: its weight or epsilon", "result_norm"),
        Point("", "output", "lm_head", "logits, with the scales and caps behind lm_head", "result_output"),
    ]


def layer_points(layer: int, points: Iterable[LayerPoint]) -> list[Point]:
    """The points of a family inside decoder layer `layer`."""
    prefix = f"model.layers.{layer}"
    return [
        Point(
            f"{prefix}.{point.module}".rstrip("."),
            point.side,
            f"{prefix}.{point.name}".rstrip("."),
            point.what,
            f"{point.node}-{layer}",
            point.heads_first,
        )
        for point in points
    ]


def _output(module: str, what: str, node: str) -> Point:
    return Point(module, "output", module, what, node)


def onnx_values(model: onnx.ModelProto, points: list[Point]) -> dict[str, str]:
    """Point key -> name of the value in the graph; points that the graph does not show are left out."""
    made = [name for node in model.graph.node for name in node.output if name]
    sums = _residual_sums(model)
    found: dict[str, str | None] = {}
    for point in points:
        found[point.key] = sums.get(point.key) or _last(made, point)
    return {key: name for key, name in found.items() if name}


def _last(made: list[str], point: Point) -> str | None:
    """The last value that the module made: after bias and offset branch."""
    prefix = f"v_{point.module}."
    if point.name == "model.embed_tokens":
        prefix = f"v_{point.name}."
    elif point.side == "input":  # of o_proj and down_proj: the last thing its parent did itself
        prefix = f"v_{point.module.rpartition('.')[0]}."
    if point.name == "lm_head":
        return "logits"
    own = [name for name in made if name.startswith(prefix) and name[len(prefix) :][:1].isupper()]
    return own[-1] if own else None


def _residual_sums(model: onnx.ModelProto) -> dict[str, str]:
    """Point key -> value for what goes into each norm: the residual stream, and the embedding at its start."""
    sources = _weight_names(model)
    sums: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type not in NORMS:
            continue
        with_residual = node.op_type == WITH_RESIDUAL
        norm = sources.get(node.input[2 if with_residual else 1], "").removesuffix(".weight")
        value = node.output[3] if with_residual and len(node.output) > 3 else node.input[0]
        layer = _layer_of(norm)
        if layer is not None and norm.endswith((".post_attention_layernorm", ".pre_feedforward_layernorm")):
            sums[f"{norm} input"] = value
        elif layer == 0 and norm.endswith(FIRST_NORM):
            sums["model.layers.0 input"] = value
        elif layer is not None and norm.endswith(FIRST_NORM):
            sums[f"model.layers.{layer - 1} output"] = value
        elif norm == "model.norm":
            last = max((i for name in sources.values() if (i := _layer_of(name)) is not None), default=0)
            sums[f"model.layers.{last} output"] = value
    return sums


def _weight_names(model: onnx.ModelProto) -> Mapping[str, str]:
    """Value name -> initializer it is, is cast from, or (weights of norms) is shifted from by a constant."""
    names = {tensor.name: tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        known = [names[name] for name in node.input if name in names]
        if node.op_type == "Cast" and known:
            names[node.output[0]] = known[0]
        elif node.op_type == "Add" and len(known) == 2:
            names |= {output: name for name in known if name.endswith("norm.weight") for output in node.output}
    return names


def _layer_of(name: str) -> int | None:
    """5 for "model.layers.5.input_layernorm"; None for a name outside the decoder layers."""
    rest = name.removeprefix("model.layers.")
    number = rest.partition(".")[0]
    return int(number) if rest != name and number.isdigit() else None
