"""An ONNX folder of any tool: which tensor of the model every constant is, by the names that tools keep of its modules.

Exporters name nodes and initializers after the module they come from (`/model/layers.0/attn/qkv_proj/MatMul_Q4`,
`model.layers.0.mlp.up_proj.weight`, `onnx::MatMul_12` read by `/model/layers.0/mlp/up_proj/MatMul`). Matrices are read
from MatMul, Gemm and Gather and from their quantized kinds (onnx_values.py). Where no name tells, the wiring does
(onnx_places.py). Fused q, k, v and gate, up are cut into the model's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import InputError
from qalora_export.formats.onnx.layout import graph_file
from qalora_export.formats.onnx.read import MODULES_KEY, read_back
from qalora_export.formats.onnx.validate import read_model
from qalora_export.models.families import family_of
from qalora_export.models.families.family import head_dim
from qalora_export.verify.foreign.artifact import Foreign, Rows, Tensor
from qalora_export.verify.foreign.onnx_places import places
from qalora_export.verify.foreign.onnx_values import Constant, Values, attribute

if TYPE_CHECKING:
    import onnx

MODULE = re.compile(
    r"layers[./](?P<layer>\d+)[./](?:(?P<block>self_attn|attn|attention|mlp)[./])?"
    r"(?P<leaf>(?:q|k|v|qkv|o|gate|up|gate_up|down)_proj|q_norm|k_norm|\w*layernorm)\b"
)
OUTSIDE = {
    "model.embed_tokens": re.compile(r"embed_tokens"),
    "model.norm": re.compile(r"final_norm_layernorm|final_norm|model[./]norm\b"),
    "lm_head": re.compile(r"lm_head"),
}
GATHERS = ("Gather", "GatherBlockQuantized")
PRODUCTS = ("MatMulNBits", "MatMul", "Gemm", "MatMulInteger")
NORMS = ("LayerNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "RMSNormalization")
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def open_onnx(graph: Graph, config: Mapping[str, Any], source: set[str]) -> Foreign:
    """As gguf_file.open_gguf. Raises InputError where no tensor of the model is found at all."""
    found = dict[str, Constant]()
    for name, constant in graph.exported() if graph.is_ours else graph.constants():
        for part, values in _parts(name, constant.values, config, source):
            found.setdefault(part, Constant(values, constant.kind, constant.stored_as))
    if not found:
        raise InputError(
            "no tensor of the model is in the graph under a name that tells which it is",
            where=graph.folder,
            why="the tool that made it kept no names of modules",
            fix="export it again with names, or look at its logits only",
        )
    family = family_of(config)
    needed = {f"{module}.weight" for module in family.required_modules(config)} & source
    if "lm_head.weight" in found and family.ties_head(config):
        needed.discard("lm_head.weight")
    shift = family.norm_shift
    tensors = {name: _tensor(name, constant, shift) for name, constant in found.items()}
    return Foreign(graph.folder, tensors, absent=tuple(sorted(needed - tensors.keys())))


def _tensor(name: str, constant: Constant, shift: float) -> Tensor:
    def load(rows: slice) -> Rows:
        return constant.values[rows]

    added = shift if name.endswith("norm.weight") else 0.0
    return Tensor(name, constant.stored_as, constant.kind, constant.values.shape, load, shift=added)


def _parts(
    name: str, values: NDArray[np.float32], config: Mapping[str, Any], source: set[str]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The tensor itself, or the model's tensors that it is several of."""
    module, _, suffix = name.rpartition(".")
    stem, _, leaf = module.rpartition(".")
    if leaf not in PARTS or name in source:
        yield name, values
        return
    heads, size = config["num_attention_heads"], head_dim(config)
    kv = config.get("num_key_value_heads") or heads
    width = config["intermediate_size"]
    rows = (heads * size, kv * size, kv * size) if leaf == "qkv_proj" else (width, width)
    if len(values) != sum(rows):
        yield name, values
        return
    for part, piece in zip(PARTS[leaf], np.split(values, np.cumsum(rows)[:-1]), strict=True):
        yield f"{stem}.{part}.{suffix}", piece


class Graph:
    """The constants of a graph by what they are in the model."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, read_model(folder)
        self.values = Values(self.model, graph_file(folder).parent)

    def constants(self) -> Iterator[tuple[str, Constant]]:
        """(name of a tensor in Transformers, its numbers), in the order of the graph."""
        for node in self.model.graph.node:
            for place, suffix in self._reads(node):
                name = self._name(node, self._stored(node.input[place]) or node.input[place], suffix)
                constant = self._constant(node, place) if name else None
                if constant is not None:
                    yield name, constant

    @cached_property
    def is_ours(self) -> bool:
        """Whether this program exported it, whose matrices are codes and what is added for their offsets."""
        return any(entry.key == MODULES_KEY for entry in self.model.metadata_props)

    def exported(self) -> Iterator[tuple[str, Constant]]:
        """The same of a folder of ours, by its own reader."""
        contents = read_back(self.folder)
        for module, (bits, group) in contents.modules.items():
            values = contents.group_affine(module).dequantize()
            yield f"{module}.weight", Constant(values, f"int{bits} g{group} offset", f"{module}.codes")
        for name in contents.others:
            values = contents.tensor(name)
            kind = {"float16": "F16", "bfloat16": "BF16"}.get(values.dtype.name, "F32")
            yield name, Constant(values.astype(np.float32), kind, name)

    def _reads(self, node: onnx.NodeProto) -> list[tuple[int, str]]:
        """(index of an input, what of the module it is)."""
        places = dict.fromkeys(PRODUCTS, 1) | dict.fromkeys(GATHERS, 0)
        count = len(node.input)
        if node.op_type in NORMS:
            return [(2 if node.op_type.startswith("Skip") else 1, "weight")]
        if node.op_type in ("Add", "Mul"):
            suffix = "bias" if node.op_type == "Add" else "weight"
            return [(place, suffix) for place in range(count) if self._stored(node.input[place])]
        if node.op_type not in places:
            return []
        biased = {"MatMulNBits": 5, "Gemm": 2}.get(node.op_type, count)
        return [
            (places[node.op_type], "weight"),
            *([(biased, "bias")] if count > biased and node.input[biased] else []),
        ]

    def _stored(self, value: str) -> str:
        """The name that a constant had before it was quantized; "" where the value is none."""
        if value in self.values.tensors:
            return value
        maker = self.values.maker(value)
        if maker is None or maker.op_type != "DequantizeLinear" or maker.input[0] not in self.values.tensors:
            return ""
        return str(maker.input[0]).removesuffix("_quantized")  # as ONNX Runtime's quantizer calls its codes

    def _name(self, node: onnx.NodeProto, value: str, suffix: str) -> str:
        """By the constant's own name, else by its node's, else by what it feeds; "" where none of these tells."""
        if node.op_type in ("Add", "Mul") and not value.endswith((".weight", ".bias")):
            return ""
        for text in (value, node.name):
            if found := MODULE.search(text):
                block = {"attn": "self_attn", "attention": "self_attn"}.get(found["block"] or "", found["block"])
                leaf = found["leaf"]
                if leaf in ("q_norm", "k_norm") or leaf.endswith("_proj"):
                    block = block or ("mlp" if leaf.split("_")[0] in ("gate", "up", "down") else "self_attn")
                if "final_norm" in leaf:
                    return "model.norm.weight"
                return ".".join(["model.layers", found["layer"], *([block] if block else []), leaf, suffix])
            for module, pattern in OUTSIDE.items():
                if pattern.search(text):
                    tied = module == "lm_head" and node.op_type in GATHERS  # named after the head that shares it
                    return f"{'model.embed_tokens' if tied else module}.{suffix}"
        place = self._places.get(node.output[0]) if node.op_type in PRODUCTS and suffix == "weight" else None
        return f"{place}.{suffix}" if place else ""

    @cached_property
    def _places(self) -> dict[str, str]:
        """Modules of products by their wiring."""
        nodes = [node for node in self.model.graph.node if node.op_type in PRODUCTS and len(node.input) > 1]
        return places(self.model, [node for node in nodes if self.values.is_matrix(node.input[1]) and node.output])

    def _constant(self, node: onnx.NodeProto, place: int) -> Constant | None:
        if node.op_type == "MatMulNBits" and place == 1:
            return self.values.nbits(node)
        if node.op_type == "GatherBlockQuantized" and place == 0:
            return self.values.gathered(node)
        if node.op_type == "MatMulInteger":
            product = self.values.integer_product(node)
            return None if product is None else product.weight.transposed
        constant = self.values.evaluated(node.input[place])
        if constant is None and node.op_type == "Gather":
            constant = self.values.dequantized_behind(node)
        if constant is None:
            return None
        transposed = node.op_type == "MatMul" or (node.op_type == "Gemm" and not attribute(node, "transB", 0))
        return constant.transposed if transposed and constant.values.ndim == 2 else constant

    @cached_property
    def is_half(self) -> bool:
        """Whether it computes in float16 or bfloat16."""
        return any(tensor.data_type in (10, 16) for tensor in self.model.graph.initializer)

    @cached_property
    def rounds_whole_inputs(self) -> bool:
        """Whether its products round their inputs by themselves, a whole input at a time (quantize_dynamic)."""
        return any(node.op_type == "MatMulInteger" for node in self.model.graph.node)

    @cached_property
    def rounds_to_ranges(self) -> bool:
        """Whether it rounds activations to ranges of its own (static quantization)."""
        return any(node.op_type == "QuantizeLinear" for node in self.model.graph.node)

    def steps_of_no_size(self) -> list[str]:
        """What QuantizeLinear rounds in steps that are 0, negative, NaN or infinite: a calibration that saw nothing, or
        the −∞ of an attention mask, leaves such.
        """
        found = []
        for node in self.model.graph.node:
            if node.op_type == "QuantizeLinear" and (step := self.values.array(node.input[1])) is not None:
                wrong = step[~(np.isfinite(step) & (step > 0))]
                found += [f"{node.input[0]} ({wrong[0]:g})"] if wrong.size else []
        return found

    @cached_property
    def attention(self) -> list[onnx.NodeProto]:
        """The fused attention nodes, a layer each, in the order of the graph."""
        return [node for node in self.model.graph.node if node.op_type == "GroupQueryAttention"]
