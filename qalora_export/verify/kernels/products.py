"""The matrix products of an artifact's graph, and how far what a runtime gave is from what it documents.

A Linear is one linear layer: the sum of the products it is written as (codes, and the branch of the offsets where the
layout has one). A Product knows its weights as the file holds them and the ways in which the runtime may round x.
Weights are read some rows at a time: memory holds ROWS_BYTES of them, whatever the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.models.families import family_of
from qalora_export.verify.kernels.arithmetic import (
    BACKWARD,
    Arithmetic,
    Float32,
    Seen,
    Weight,
    product,
    product_of,
)

HEAD = "lm_head"
ROWS_BYTES = 32 << 20  # of float64 weights at a time
ROUNDING_ROWS = 8  # of so many rows one is looked at for what rounding x costs


@dataclass(frozen=True, slots=True)
class Product:
    """y = x̂ Ŵᵀ. weight: name of its tensor in the file. x, y: names by which a runtime shows what it saw and gave.

    shape: (out, in). rows: Ŵ of some rows. ways: the documented arithmetics, any of which is right. reads: the value of
    another product that its x must be, bit for bit. summed: whether y is part of the layer's sum or feeds another.
    rounded: by a way's name, Ŵ where that way does not compute with the file's own.
    """

    weight: str
    x: str
    y: str
    shape: tuple[int, int]
    rows: Callable[[slice], Weight]
    ways: tuple[Arithmetic, ...]
    reads: str = ""
    summed: bool = True
    rounded: Mapping[str, Callable[[slice], Weight]] = field(default_factory=dict)

    def parts(self, way: str = "") -> Iterator[tuple[slice, Weight]]:
        """The weights from the first row to the last, as this way has them."""
        out, features = self.shape
        weights = self.rounded.get(way, self.rows)
        step = max(1, ROWS_BYTES // (8 * features))
        for begin in range(0, out, step):
            rows = slice(begin, min(begin + step, out))
            yield rows, weights(rows)


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer by its Transformers name. products: what it is the sum of, before any bias.

    order: Transformers row -> row of the products, None where they are the same.
    """

    module: str
    products: tuple[Product, ...]
    order: NDArray[np.intp] | None = None


def linear_modules(config: Mapping[str, Any]) -> list[str]:
    """Every linear layer of a model by its Transformers name, in the order of the data flow."""
    leaves = family_of(config).linears
    layers = range(config["num_hidden_layers"])
    return [*(f"model.layers.{layer}.{leaf}" for layer in layers for leaf in leaves), HEAD]


@dataclass(frozen=True, slots=True)
class TappedGraph:
    """What to run to see inside an artifact: the model file, and for ONNX the folder of its data, for GGUF an adapter.

    linears: in the order of the data flow; logits: the name of the model's own answer.
    """

    model: Path
    linears: tuple[Linear, ...]
    logits: str
    data: Path | None = None
    lora: Path | None = None


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far a product is from what it documents, by the first of its ways that is right, else by the nearest.

    way: that one's name. backward: largest |Y − Ŷ| / (|x̂| |Ŵ|ᵀ), inf for NaN and other shapes. relative: ‖Y − Ŷ‖ / ‖Ŷ‖.
    rounding: ‖Ŷ − x Ŵᵀ‖ / ‖x Ŵᵀ‖, what rounding x costs here (by some of the rows). row, position: where backward is
    largest.
    """

    weight: str
    way: str
    backward: float
    relative: float
    rounding: float
    row: int
    position: int


def deviation(of: Product, x: Float32, y: Float32, bound: float = BACKWARD) -> Deviation:
    """x (positions, in) and y (positions, out), float32, as the runtime's product saw and gave them."""
    out, features = of.shape
    if x.shape != (len(x), features) or y.shape != (len(x), out) or not len(x):
        return Deviation(of.weight, f"shapes {x.shape} and {y.shape}", np.inf, np.inf, np.inf, 0, 0)
    found = []
    for way in of.ways:
        sums, seen = _Sums(), way.seen(x)
        for rows, weight in of.parts(way.name):
            sums.add(rows.start, y[:, rows], seen, weight, x)
        found.append(sums.as_deviation(of.weight, way.name))
        if found[-1].backward <= bound:
            return found[-1]
    return min(found, key=lambda one: one.backward)


@dataclass
class _Sums:
    """Figures of one way, over the rows of the weights so far."""

    backward: float = 0.0
    place: tuple[int, int] = (0, 0)
    squares: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("error", "y", "rounding", "plain"), 0.0))

    def add(self, begin: int, y: Float32, seen: Seen, weight: Weight, x: Float32) -> None:
        expected, size = product(seen, weight)
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.abs(y - expected)
            ratio = np.divide(error, size, out=np.where(error > 0, np.inf, 0.0), where=size > 0)
        ratio = np.where(np.isfinite(ratio), ratio, np.inf)  # NaN and Inf are as far away as can be
        position, row = np.unravel_index(int(ratio.argmax()), ratio.shape)
        if ratio[position, row] > self.backward:
            self.backward, self.place = float(ratio[position, row]), (int(position), begin + int(row))
        some = slice(None, None, ROUNDING_ROWS)
        plain = product_of(x.astype(np.float64), weight.some(some))
        found = {"error": error, "y": expected, "rounding": expected[:, some] - plain, "plain": plain}
        for name, values in found.items():
            self.squares[name] += float(np.vdot(values, values))

    def as_deviation(self, weight: str, way: str) -> Deviation:
        position, row = self.place
        relative, rounding = self._share("error", "y"), self._share("rounding", "plain")
        return Deviation(weight, way, self.backward, relative, rounding, row, position)

    def _share(self, part: str, whole: str) -> float:
        above, below = self.squares[part], self.squares[whole]
        return float(np.sqrt(above / below)) if below > 0 else float("inf") if above > 0 else 0.0
