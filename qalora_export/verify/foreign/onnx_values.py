"""The numbers of constants in an ONNX graph, however a tool packed them: float32, out-features first.

MatMulNBits, GatherBlockQuantized     s·(q − z) in blocks, codes packed in bytes or of an integer type of 4 bits
DequantizeLinear                      s·(q − z) in blocks, a channel at a time or of a whole tensor
MatMulInteger                         the same of int8, its scale multiplied to the product behind it
Transpose, Cast                       of any of these
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

FLOAT_KINDS = {1: "F32", 10: "F16", 11: "F64", 16: "BF16"}  # onnx.TensorProto


@dataclass(frozen=True)
class Constant:
    """A matrix of the graph, float32 (out, in), or a vector; kind as in artifact.Tensor."""

    values: NDArray[np.float32]
    kind: str
    stored_as: str

    @property
    def transposed(self) -> Constant:
        return Constant(np.ascontiguousarray(self.values.T), self.kind, self.stored_as)


@dataclass(frozen=True)
class IntegerProduct:
    """A product of int8 weights. x: the value that is rounded for it; y: its scaled result. weight: (in, out)."""

    x: str
    y: str
    weight: Constant


class Values:
    """Constants of a graph by the values that nodes read. data: the folder of its external data."""

    def __init__(self, model: onnx.ModelProto, data: Path) -> None:
        self._data = data
        self.tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in (node for node in model.graph.node if node.op_type == "Constant"):
            self.tensors |= {name: each.t for each in node.attribute if each.name == "value" for name in node.output}
        self._makers = {name: node for node in model.graph.node for name in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self._readers[name].append(node)

    def maker(self, name: str) -> onnx.NodeProto | None:
        """The node that makes a value; None for constants and inputs."""
        return self._makers.get(name)

    def array(self, name: str) -> NDArray[Any] | None:
        """A constant as it is stored; None where there is none of this name."""
        from onnx import numpy_helper

        tensor = self.tensors.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor, str(self._data))

    def evaluated(self, name: str) -> Constant | None:
        """A constant, or what DequantizeLinear, Transpose and Cast make of one; in the graph's own order of axes."""
        if (tensor := self.tensors.get(name)) is not None:
            kind = FLOAT_KINDS.get(tensor.data_type)
            values = self.array(name)
            return None if kind is None or values is None else Constant(values.astype(np.float32), kind, name)
        maker = self._makers.get(name)
        if maker is None:
            return None
        if maker.op_type == "DequantizeLinear":
            return self.dequantized(maker)
        if maker.op_type not in ("Transpose", "Cast"):
            return None
        inner = self.evaluated(maker.input[0])
        if inner is None or maker.op_type == "Cast" or inner.values.ndim != 2:
            return inner
        return inner.transposed

    def is_matrix(self, name: str) -> bool:
        """Whether a value is a constant of two axes or more, packed ones included."""
        seen = set[str]()
        while name not in self.tensors:
            maker = self._makers.get(name)
            if name in seen or maker is None or maker.op_type not in ("DequantizeLinear", "Transpose", "Cast"):
                return False
            seen.add(name)
            name = maker.input[0]
        return len(self.tensors[name].dims) > 1

    def dequantized_behind(self, gather: onnx.NodeProto) -> Constant | None:
        """The whole matrix of an embedding whose codes are gathered before they are dequantized."""
        last = self._reader(gather.output[0], "DequantizeLinear")
        return None if last is None else self.dequantized(last, of=gather.input[0])

    def dequantized(self, node: onnx.NodeProto, *, of: str = "") -> Constant | None:
        """(q − z)·s along `axis`, in blocks or a channel at a time (ONNX, DequantizeLinear). of: its codes."""
        name = of or node.input[0]
        codes, scale, zero = self._quantized([name, *node.input[1:]])
        if codes is None or scale is None:
            return None
        axis, block = attribute(node, "axis", 1) % max(1, codes.ndim), attribute(node, "block_size", 0)
        bits = {"4": 4, "2": 2}.get(self._integer(name)[-1], 8)
        if block:
            scale, zero = (np.repeat(part, block, axis).take(range(codes.shape[axis]), axis) for part in (scale, zero))
        elif scale.ndim == 1 and scale.size > 1:
            shape = [-1 if index == axis else 1 for index in range(codes.ndim)]
            scale, zero = scale.reshape(shape), zero.reshape(shape)
        kind = f"int{bits} g{block}" if block else _channels(bits, codes, scale, axis)
        with np.errstate(invalid="ignore"):  # 0 · ∞ of a range without a size, which is NaN and told as that
            values = (codes - zero) * scale
        return Constant(values, f"{kind} offset", name)

    def integer_product(self, node: onnx.NodeProto) -> IntegerProduct | None:
        """What MatMulInteger is of, as onnxruntime's quantize_dynamic writes it: DynamicQuantizeLinear before it, Cast
        and Mul behind it.
        """
        codes, scale, zero = self._quantized([node.input[1], "", node.input[3] if len(node.input) > 3 else ""])
        rounding = self._makers.get(node.input[0])
        cast = self._reader(node.output[0], "Cast")
        last = None if cast is None else self._reader(cast.output[0], "Mul")
        if codes is None or rounding is None or rounding.op_type != "DynamicQuantizeLinear" or last is None:
            return None
        scales = (self._makers.get(name) for name in last.input)
        both = next((maker for maker in scales if maker is not None and maker.op_type == "Mul"), None)
        scale = next((found for name in both.input if (found := self.array(name)) is not None), None) if both else None
        if scale is None:
            return None
        scale = scale.astype(np.float32)
        kind = _channels(8, codes, scale, 1)
        weight = Constant((codes - zero) * scale, f"{kind} offset", node.input[1])
        return IntegerProduct(rounding.input[0], last.output[0], weight)

    def nbits(self, node: onnx.NodeProto) -> Constant | None:
        """s·(q − z), z = 2^(bits−1) where there is none (com.microsoft, MatMulNBits)."""
        bits, group = attribute(node, "bits", 4), attribute(node, "block_size", 32)
        out, features = attribute(node, "N", 0), attribute(node, "K", 0)
        packed, scale = self.array(node.input[1]), self.array(node.input[2])
        if packed is None or scale is None or bits not in (2, 4, 8) or (len(node.input) > 4 and node.input[4]):
            return None
        blocks = -(-features // group)
        codes = _unpacked(packed.reshape(out, -1), bits)[:, : blocks * group].reshape(out, blocks, group)
        scale = scale.astype(np.float32).reshape(out, blocks)
        stored = self.array(node.input[3]) if len(node.input) > 3 and node.input[3] else None
        values = (codes - _zeros(stored, bits, out, blocks)[..., None]) * scale[..., None]
        return Constant(
            values.reshape(out, -1)[:, :features].astype(np.float32), _blocks(bits, group, stored), node.input[1]
        )

    def gathered(self, node: onnx.NodeProto) -> Constant | None:
        """Rows of an embedding in blocks along its width (com.microsoft, GatherBlockQuantized).

        Of bytes, z = 2^(bits−1) where there is none; of an integer type of 4 bits, 0. A head's own codes, which GenAI's
        builder shares with a tied embedding, come through a Reshape.
        """
        group, scale = attribute(node, "block_size", 128), self.array(node.input[2])
        maker = self._makers.get(node.input[0])
        name = maker.input[0] if maker is not None and maker.op_type == "Reshape" else node.input[0]
        packed = self.array(name)
        if packed is None or scale is None or packed.ndim < 2:
            return None
        packed = packed.reshape(len(packed), -1)
        rows, blocks = len(packed), scale.reshape(len(packed), -1).shape[1]
        stored = self.array(node.input[3]) if len(node.input) > 3 and node.input[3] else None
        if packed.dtype == np.uint8:
            bits = attribute(node, "bits", 4)
            codes, zero = _unpacked(packed, bits), _zeros(stored, bits, rows, blocks)
        else:
            bits, codes = 4, packed.astype(np.float32)
            zero = np.zeros((rows, blocks), np.float32) if stored is None else stored.astype(np.float32)
        codes = codes[:, : blocks * group].reshape(rows, blocks, -1)
        values = (codes - zero.reshape(rows, blocks, 1)) * scale.astype(np.float32).reshape(rows, blocks, 1)
        return Constant(values.reshape(rows, -1).astype(np.float32), _blocks(bits, group, stored), name)

    def _quantized(self, names: Any) -> tuple[Any, Any, Any]:
        """(codes, scale, zero), float32 each; zero is 0 where there is none. None for what is no constant."""
        codes, scale, zero = ((self.array(name) if name else None) for name in [*names, "", ""][:3])
        codes, scale = (None if part is None else part.astype(np.float32) for part in (codes, scale))
        if zero is not None:
            return codes, scale, zero.astype(np.float32)
        return codes, scale, np.zeros_like(scale) if scale is not None else np.float32(0)

    def _reader(self, value: str, kind: str) -> onnx.NodeProto | None:
        return next((node for node in self._readers[value] if node.op_type == kind), None)

    def _integer(self, name: str) -> str:
        import onnx

        return str(onnx.TensorProto.DataType.Name(self.tensors[name].data_type))


def _blocks(bits: int, group: int, zero: NDArray[Any] | None) -> str:
    return f"int{bits} g{group}" + ("" if zero is None else " offset")


def _channels(bits: int, codes: NDArray[Any], scale: NDArray[Any], axis: int) -> str:
    """A kind of (in, out) or (out, in) codes whose step is one for each channel of `axis`, or one for all, in
    blocks of the shorter axis then, as it does not matter which is which.
    """
    if scale.size == 1:
        return f"int{bits} g{min(codes.shape, default=1)} step {float(scale.reshape(-1)[0]):.9g}"
    return f"int{bits} g{codes.shape[1 - axis] if codes.ndim == 2 else codes.shape[-1]}"


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


def attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return next((int(each.i) for each in node.attribute if each.name == name), default)
