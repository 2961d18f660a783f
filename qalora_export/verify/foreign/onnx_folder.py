"""An ONNX folder of any tool: which tensor of the model every constant is, by the names that tools keep of its modules.

Exporters name nodes and initializers after the module they come from (`/model/layers.0/attn/qkv_proj/MatMul_Q4`,
`model.layers.0.mlp.up_proj.weight`, `onnx::MatMul_12` read by `/model/layers.0/mlp/up_proj/MatMul`). Matrices are read
from MatMulNBits, MatMul, Gemm, Gather, GatherBlockQuantized and through DequantizeLinear, Transpose and Cast. Fused
q, k, v and gate, up are cut into the model's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
NORMS = ("LayerNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "RMSNormalization")
FLOAT_KINDS = {1: "F32", 10: "F16", 11: "F64", 16: "BF16"}  # onnx.TensorProto
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Constant:
    """A matrix of the graph, float32 (out, in), or a vector; kind as in artifact.Tensor."""

    values: NDArray[np.float32]
    kind: str
    stored_as: str


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
        self._data = graph_file(folder).parent
        self._tensors = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self._makers = {name: node for node in self.model.graph.node for name in node.output}

    def constants(self) -> Iterator[tuple[str, Constant]]:
        """(name of a tensor in Transformers, its numbers), in the order of the graph."""
        for node in self.model.graph.node:
            for place, suffix in self._reads(node):
                name = self._name(node, node.input[place], suffix)
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
        places = {"MatMulNBits": 1, "MatMul": 1, "Gemm": 1, "Gather": 0, "GatherBlockQuantized": 0}
        count = len(node.input)
        if node.op_type in NORMS:
            return [(2 if node.op_type.startswith("Skip") else 1, "weight")]
        if node.op_type in ("Add", "Mul"):
            suffix = "bias" if node.op_type == "Add" else "weight"
            return [(place, suffix) for place in range(count) if node.input[place] in self._tensors]
        if node.op_type not in places:
            return []
        biased = {"MatMulNBits": 5, "Gemm": 2}.get(node.op_type, count)
        return [
            (places[node.op_type], "weight"),
            *([(biased, "bias")] if count > biased and node.input[biased] else []),
        ]

    def _name(self, node: onnx.NodeProto, value: str, suffix: str) -> str:
        """By the constant's own name, else by its node's; "" where neither tells."""
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
                    return f"{module}.{suffix}"
        return ""

    def _constant(self, node: onnx.NodeProto, place: int) -> Constant | None:
        if node.op_type == "MatMulNBits" and place == 1:
            return self._nbits(node)
        if node.op_type == "GatherBlockQuantized" and place == 0:
            return self._gathered(node)
        constant = self._evaluated(node.input[place])
        if constant is None:
            return None
        transposed = node.op_type == "MatMul" or (node.op_type == "Gemm" and not _attribute(node, "transB", 0))
        if transposed and constant.values.ndim == 2:
            return Constant(np.ascontiguousarray(constant.values.T), constant.kind, constant.stored_as)
        return constant

    def array(self, name: str) -> NDArray[Any] | None:
        """An initializer; None where there is none of this name."""
        from onnx import numpy_helper

        tensor = self._tensors.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor, str(self._data))

    def _evaluated(self, name: str) -> Constant | None:
        """A constant, or what DequantizeLinear, Transpose and Cast make of one."""
        if (tensor := self._tensors.get(name)) is not None:
            kind = FLOAT_KINDS.get(tensor.data_type)
            values = self.array(name)
            return None if kind is None or values is None else Constant(values.astype(np.float32), kind, name)
        maker = self._makers.get(name)
        if maker is None:
            return None
        if maker.op_type == "DequantizeLinear":
            return self._dequantized(maker)
        if maker.op_type not in ("Transpose", "Cast"):
            return None
        inner = self._evaluated(maker.input[0])
        if inner is None or maker.op_type == "Cast" or inner.values.ndim != 2:
            return inner
        return Constant(np.ascontiguousarray(inner.values.T), inner.kind, inner.stored_as)

    def _dequantized(self, node: onnx.NodeProto) -> Constant | None:
        """(q − z)·s along `axis`, in blocks or a channel at a time (ONNX, DequantizeLinear)."""
        arrays = [self.array(name) if name else None for name in node.input]
        if arrays[0] is None or arrays[1] is None:
            return None
        codes, scale = arrays[0].astype(np.float32), arrays[1].astype(np.float32)
        zero = arrays[2].astype(np.float32) if len(arrays) > 2 and arrays[2] is not None else np.zeros_like(scale)
        axis, block = _attribute(node, "axis", 1) % max(1, codes.ndim), _attribute(node, "block_size", 0)
        bits = {"4": 4, "2": 2}.get(self._integer(node.input[0])[-1], 8)
        group = block or (codes.shape[1 - axis] if codes.ndim == 2 and scale.size > 1 else codes.shape[-1])
        if block:
            scale, zero = (np.repeat(part, block, axis).take(range(codes.shape[axis]), axis) for part in (scale, zero))
        elif scale.ndim == 1 and scale.size > 1:
            shape = [-1 if index == axis else 1 for index in range(codes.ndim)]
            scale, zero = scale.reshape(shape), zero.reshape(shape)
        return Constant((codes - zero) * scale, f"int{bits} g{group} offset", node.input[0])

    def _integer(self, name: str) -> str:
        import onnx

        return str(onnx.TensorProto.DataType.Name(self._tensors[name].data_type))

    def _nbits(self, node: onnx.NodeProto) -> Constant | None:
        """s·(q − z), z = 2^(bits−1) where there is none (com.microsoft, MatMulNBits)."""
        bits, group = _attribute(node, "bits", 4), _attribute(node, "block_size", 32)
        out, features = _attribute(node, "N", 0), _attribute(node, "K", 0)
        packed, scale = self.array(node.input[1]), self.array(node.input[2])
        if packed is None or scale is None or bits not in (2, 4, 8) or (len(node.input) > 4 and node.input[4]):
            return None
        blocks = -(-features // group)
        codes = _unpacked(packed.reshape(out, -1), bits)[:, : blocks * group].reshape(out, blocks, group)
        scale = scale.astype(np.float32).reshape(out, blocks)
        stored = self.array(node.input[3]) if len(node.input) > 3 and node.input[3] else None
        zero = _zeros(stored, bits, out, blocks)
        values = (codes - zero[..., None]) * scale[..., None]
        kind = f"int{bits} g{group}" + ("" if stored is None else " offset")
        return Constant(values.reshape(out, -1)[:, :features].astype(np.float32), kind, node.input[1])

    def _gathered(self, node: onnx.NodeProto) -> Constant | None:
        """Rows of an embedding in blocks along its width (com.microsoft, GatherBlockQuantized)."""
        bits, group = _attribute(node, "bits", 4), _attribute(node, "block_size", 128)
        packed, scale = self.array(node.input[0]), self.array(node.input[2])
        if packed is None or scale is None or packed.dtype != np.uint8 or bits not in (2, 4, 8):
            return None
        rows, blocks = len(packed), scale.reshape(len(packed), -1).shape[1]
        codes = _unpacked(packed.reshape(rows, -1), bits)[:, : blocks * group].reshape(rows, blocks, -1)
        stored = self.array(node.input[3]) if len(node.input) > 3 and node.input[3] else None
        values = (codes - _zeros(stored, bits, rows, blocks)[..., None]) * scale.astype(np.float32).reshape(
            rows, blocks, 1
        )
        kind = f"int{bits} g{group}" + ("" if stored is None else " offset")
        return Constant(values.reshape(rows, -1).astype(np.float32), kind, node.input[0])

    @cached_property
    def is_half(self) -> bool:
        """Whether it computes in float16 or bfloat16."""
        return any(tensor.data_type in (10, 16) for tensor in self.model.graph.initializer)

    @cached_property
    def attention(self) -> list[onnx.NodeProto]:
        """The fused attention nodes, a layer each, in the order of the graph."""
        return [node for node in self.model.graph.node if node.op_type == "GroupQueryAttention"]


def _unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[np.float32]:
    """(rows, bytes) -> (rows, codes), the lowest bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    return codes.reshape(len(packed), -1).astype(np.float32)


def _zeros(stored: NDArray[Any] | None, bits: int, rows: int, blocks: int) -> NDArray[np.float32]:
    if stored is None:
        return np.full((rows, blocks), 2.0 ** (bits - 1), np.float32)
    if stored.dtype != np.uint8:
        return stored.astype(np.float32).reshape(rows, blocks)
    return _unpacked(stored.reshape(rows, -1), bits)[:, :blocks]


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)
