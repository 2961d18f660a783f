"""GELU on the exact path: what llama.cpp looks up is held to its table, then replaced by the function itself.

ggml's CPU backend computes GELU through a table (GGML_GELU_FP16 in ggml-cpu/vec.h): from −10 to 10 x is rounded to
float16 and so is the table's value; beyond, the value is x or 0. In logits that costs an NMSE of 1e-7 to 1e-6, and two
runs that agree to float32 rounding fall on two sides of a float16 boundary: llama.cpp's own decode leaves its own
prefill by up to 5e-8 (random Gemmas of 4 to 24 layers), and so does any simulation of the table. No sharp bound can
hold on logits.

It can on the operator. Each value is compared with what the table gives for the input that this very node had, and, if
it is that, replaced by the float32 value of the function, so that the exact path rounds nowhere. A value that the table
cannot have given stays, and shows in the logits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qalora_runtimes.llama_cpp.nodes import Nodes

OPERATOR = b"GEGLU"
RESULT, GATE, UP = b"ffn_geglu", b"ffn_gate", b"ffn_up"  # names in llama.cpp's build_ffn, before "-<layer>"
LIMIT = 10.0  # where the table ends
CUBIC, SQRT_2_OVER_PI = 0.044715, math.sqrt(2 / math.pi)
# The table is computed in float32: 1 + tanh has an error of a few units of 2⁻²⁴, and x is multiplied by half of it.
TABLE_SLACK = 2.0**-22
BLOCK = 2**18  # values at a time

Wide = NDArray[np.float64]


class ExactGelu:
    """nodes.Watcher that replaces gelu(gate)·up. Counts values since `begin`.

    there: whether the graph has the operator, known once a token has gone through it.
    """

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self.there = False  # inputs are asked for only in graphs that are known to have the operator
        self._inputs: dict[bytes, NDArray[np.float32]] = {}
        self.begin()

    def begin(self) -> None:
        self._values, self._kept, self._error, self._power = 0, 0, 0.0, 0.0

    def wants(self, name: bytes, operator: bytes) -> bool:
        if operator == OPERATOR:
            self.there = True
            return True
        return self.there and name.rpartition(b"-")[0] in (GATE, UP)

    def see(self, node: int, name: bytes, operator: bytes) -> None:
        value = self._nodes.read(node)
        if value is None:
            return
        if operator != OPERATOR:
            self._inputs[name] = value
            return
        kind, _, layer = name.rpartition(b"-")
        gate, up = (self._inputs.pop(b"%s-%s" % (part, layer), None) for part in (GATE, UP))
        self._values += value.size
        if kind != RESULT or gate is None or up is None or not gate.shape == up.shape == value.shape:
            self._kept += value.size
            return
        for at in range(0, value.size, BLOCK):
            part = slice(at, at + BLOCK)
            self._replace(value[part], gate[part], up[part])
        self._nodes.write(node, value)

    def _replace(self, value: NDArray[np.float32], gate: NDArray[np.float32], up: NDArray[np.float32]) -> None:
        """Every value (n,) that the table can have given, in place."""
        by_table, exact = looked_up(value, gate, up), geglu(gate, up)
        difference = value[by_table].astype(np.float64) - exact[by_table]
        self._kept += int(value.size - np.count_nonzero(by_table))
        self._error += float(difference @ difference)
        self._power += float((exact[by_table].astype(np.float64) ** 2).sum())
        value[by_table] = exact[by_table]

    def describe(self) -> dict[str, Any]:
        """By operator; nothing when the graph has none. values: seen; kept: other than the table's, left as they were.

        nmse: what the table changed in the values that were replaced.
        """
        if not self.there:
            return {}
        nmse = self._error / self._power if self._power else 0.0
        return {OPERATOR.decode(): {"values": self._values, "kept": self._kept, "nmse": nmse}}


def gelu(x: Wide) -> Wide:
    """The tanh form, float64: x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))."""
    value: Wide = 0.5 * x * (1.0 + np.tanh(SQRT_2_OVER_PI * x * (1.0 + CUBIC * x * x)))
    return value


def geglu(gate: NDArray[np.float32], up: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32(gelu(gate)) · up, as a float32 kernel without a table computes it."""
    with np.errstate(all="ignore"):  # NaN and Inf go where the function sends them
        product: NDArray[np.float32] = gelu(gate.astype(np.float64)).astype(np.float32) * up
    return product


def looked_up(value: NDArray[np.float32], gate: NDArray[np.float32], up: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether each value (n,) is what the table gives: between its smallest and largest possible entry, times up."""
    with np.errstate(all="ignore"):
        x = gate.astype(np.float16).astype(np.float64)
        y, slack = gelu(x), TABLE_SLACK * np.abs(x)
        ends = [(y + side * slack).astype(np.float16).astype(np.float32) for side in (-1, 1)]
        beyond = np.where(gate > 0, gate, np.float32(0))
        products = [np.where(np.abs(gate) >= LIMIT, beyond, end) * up for end in ends]
        inside: NDArray[np.bool_] = (np.minimum(*products) <= value) & (value <= np.maximum(*products))
    return inside
