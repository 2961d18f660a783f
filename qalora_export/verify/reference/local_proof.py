"""Each layer of a run by itself: what the shipped kernels did to the inputs that they had.

End to end, int8 noise is chaotic: what one layer rounds differently the next ones amplify, and a kernel that is wrong
by some percent hides in it. Layer by layer it is not. Of a few short sequences the runtime shows what every matrix
product saw (x) and gave (y), in the shipped artifact, and two comparisons cover the whole graph without a gap:

    products    y against the same product of the same x in the runtime's documented arithmetic      kernels/
    between     x against what PyTorch computes in float32 from the y of the products before it: embedding, norms, RoPE,
                attention, activation, residual sums, biases; and the logits from the y of lm_head

The second is played back through the reference model, every linear layer answered by the runtime's own y, so that no
error reaches the next comparison. Where the runtime keeps keys and values in float16, attention is held to what such
rounding does there: each sequence is played back once more with the projections before attention rounded to float16,
and every key adds the rounding of a float16 sum. An activation function by a float16 table is held to the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from qalora_export.verify.kernels.products import Deviation, Linear, Product, TappedGraph, deviation
from qalora_export.verify.reference.layerwise import LayerwiseModel
from qalora_export.verify.reference.logits import fixed_threads

Mode = Literal["prefill", "decode"]
Sequences = tuple[NDArray[np.int32], ...]
Taps = Mapping[str, NDArray[np.float32]]
# Kernels are chosen by how many tokens a prompt has: one; a few, as tiles of rows leave them over; more than a tile of
# 4 to 16 rows; and whole prompts (llama.cpp's tiled attention begins at 64 tokens). Decode is long enough for a KV
# cache of several tokens.
PROMPT, SHORTER, DECODED = 65, (6, 25), 10
PASS_BYTES = 128 << 20
# Between products: float32 of two libraries differs by 1e-14 to 2e-12.
BETWEEN = 1e-9
# A float16 sum of t values is off by about t · 2⁻²⁴ in squares (llama.cpp adds up attention in float16). Measured: at
# most 13 times the simulated rounding, in models with outliers of × 64.
HALF_SUM, TIMES_HALF = 2.0**-24, 30.0
# What float16 rounding inside the runtime does to one layer's input is simulated by rounding what comes before it.
HALF_BEFORE = {"o_proj": ("q_proj", "k_proj", "v_proj", "qkv_proj"), "down_proj": ("gate_proj", "gate_up_proj")}
ATTENTION, ACTIVATION = HALF_BEFORE


@dataclass(frozen=True, slots=True)
class LayerFinding:
    """One linear layer in one mode.

    deviations: of its products. misread: products whose x is not the value it should be. between: NMSE of its x against
    the reference, the largest of any position; the mean of all behind attention and where the runtime computes in
    float16, because a softmax of large scores amplifies any rounding at single positions. allowed: BETWEEN, or
    TIMES_HALF times what float16 does to that mean.
    """

    module: str
    mode: Mode
    deviations: tuple[Deviation, ...]
    misread: tuple[str, ...]
    between: float
    allowed: float

    @property
    def excess(self) -> float:
        """between over what is allowed."""
        return self.between / self.allowed

    @property
    def worst(self) -> Deviation:
        return max(self.deviations, key=lambda one: one.backward)


@dataclass(frozen=True, slots=True)
class LocalProof:
    """layers: in the order of the data flow, prefill before decode. logits: largest NMSE of the answer by mode.

    untapped: products that the runtime did not show, by mode; nothing is known of a mode that has any.
    """

    layers: tuple[LayerFinding, ...]
    logits: Mapping[Mode, float]
    untapped: Mapping[Mode, tuple[str, ...]]

    def of(self, mode: Mode) -> LocalProof:
        """What concerns one mode."""
        layers = tuple(layer for layer in self.layers if layer.mode == mode)
        logits = {m: value for m, value in self.logits.items() if m == mode}
        return LocalProof(layers, logits, {m: names for m, names in self.untapped.items() if m == mode})


def chosen(lengths: NDArray[np.int32]) -> tuple[int, ...]:
    """Which sequences of a probe set are looked at: the shortest that is a prompt of PROMPT tokens, the shortest, and
    those whose lengths are nearest to SHORTER.

    Without one so long it is the longest. Whole sequences, so that the answers of the runs that are not looked into can
    be compared.
    """
    order = np.argsort(lengths, kind="stable")
    long_enough = [int(i) for i in order if lengths[i] >= PROMPT]
    first = long_enough[0] if long_enough else int(order[-1])
    nearest = (int(np.argmin(np.abs(lengths - length))) for length in SHORTER)
    return tuple(dict.fromkeys((first, int(order[0]), *nearest)))


def passes_of(graph: TappedGraph, positions: int) -> list[list[str]]:
    """Names to read, in passes of at most PASS_BYTES or one layer; the logits in the first."""
    passes, size, seen = [[graph.logits]], 0, {graph.logits}
    for linear in graph.linears:
        widths = {name: width for p in linear.products for name, width in ((p.x, p.shape[1]), (p.y, p.shape[0]))}
        fresh = [name for name in widths if name not in seen]
        needed = sum(4 * positions * widths[name] for name in fresh)
        if size and size + needed > PASS_BYTES:
            passes.append([])
            size = 0
        passes[-1] += fresh
        seen.update(fresh)
        size += needed
    return passes


def prove(
    checkpoint: Path,
    graph: TappedGraph,
    taps: Callable[[Mode, Sequences], Taps],
    sequences: Mapping[Mode, Sequences],
    *,
    half_cache: bool,
    half_activation: bool,
    threads: int,
) -> LocalProof:
    """taps: runs the sequences and answers values by name. half_cache: the runtime keeps keys and values in float16;
    half_activation: it computes the activation function in float16.
    """
    half = tuple(leaf for leaf, wanted in ((ATTENTION, half_cache), (ACTIVATION, half_activation)) if wanted)
    layers, logits, untapped = list[LayerFinding](), dict[Mode, float](), dict[Mode, tuple[str, ...]]()
    for mode, asked in sequences.items():
        values = taps(mode, asked)
        missing = [p.weight for p in _products(graph) if p.x not in values or p.y not in values]
        if missing or graph.logits not in values:
            untapped[mode] = tuple(missing or [graph.logits])
            continue
        playback = _Playback(graph, values, mode, asked, half)
        with fixed_threads(threads), torch.inference_mode():
            model = LayerwiseModel(checkpoint, played=playback)
            twice = asked * 2 if half else asked
            (answer,) = model.run(twice, decode=mode == "decode", prefill=mode == "prefill")
        layers += playback.findings
        logits[mode] = float(position_nmse(_log_softmax(_rows(values[graph.logits])), answer[: playback.total]).max())
    return LocalProof(tuple(layers), logits, untapped)


def _products(graph: TappedGraph) -> Iterator[Product]:
    return (product for linear in graph.linears for product in linear.products)


@dataclass
class _Open:
    """A linear layer while its positions come by: y (total, out) in Transformers order, and the x that came."""

    linear: Linear
    y: NDArray[np.float32]
    found: tuple[Deviation, ...]
    misread: tuple[str, ...]
    x: list[NDArray[np.float32]] = field(default_factory=list)
    count: int = 0


class _Playback:
    """layerwise.Played: answers each linear layer with the runtime's own y and compares what it was asked with x.

    half: leaves of HALF_BEFORE before which the runtime rounds to float16. Positions come in the order of the job; with
    `half` all of them a second time, where the layers before such a place answer rounded to float16.
    """

    def __init__(
        self, graph: TappedGraph, values: Taps, mode: Mode, sequences: Sequences, half: tuple[str, ...]
    ) -> None:
        self.findings: list[LayerFinding] = []
        self.total = sum(map(len, sequences))
        self._keys = np.concatenate([np.arange(len(ids)) for ids in sequences])  # before each position
        self._linears = {linear.module: linear for linear in graph.linears}
        self._values, self._mode, self._rounds, self._half = values, mode, 2 if half else 1, half
        self._rounded = {leaf for place in half for leaf in HALF_BEFORE[place]}
        self._open: dict[str, _Open] = {}

    def __call__(self, module: str, x: torch.Tensor) -> torch.Tensor:
        """x (1, tokens, in) -> (1, tokens, out), both float32."""
        if module not in self._open:
            self._open[module] = self._opened(self._linears[module])
        now, tokens = self._open[module], x.shape[1]
        begin = now.count % self.total
        y = now.y[begin : begin + tokens]
        if now.count >= self.total and module.rpartition(".")[2] in self._rounded:
            with np.errstate(over="ignore"):
                y = y.astype(np.float16).astype(np.float32)
        now.x.append(x[0].numpy().copy())
        now.count += tokens
        if now.count == self._rounds * self.total:
            self._close(module)
        return torch.from_numpy(np.ascontiguousarray(y))[None]

    def _opened(self, linear: Linear) -> _Open:
        y: NDArray[np.float32] | None = None
        found, misread = [], []
        for product in linear.products:
            x, gave = _rows(self._values[product.x]), _rows(self._values[product.y])
            found.append(deviation(product, x, gave))
            if product.reads and not np.array_equal(x, _rows(self._values[product.reads])):
                misread.append(product.weight)
            if product.summed:
                y = gave if y is None else y + gave
        assert y is not None
        ordered = y if linear.order is None else y[:, linear.order]
        return _Open(linear, ordered, tuple(found), tuple(misread))

    def _close(self, module: str) -> None:
        done = self._open.pop(module)
        want = np.concatenate(done.x)
        got = _rows(self._values[done.linear.products[0].x])
        reference, half = want[: self.total], want[self.total :]
        error, leaf = position_nmse(got, reference), module.rpartition(".")[2]
        between, allowed = float(error.max()), BETWEEN
        if leaf == ATTENTION or leaf in self._half:
            between = float(error.mean())
        if leaf in self._half:
            terms = 1 + self._keys if leaf == ATTENTION else np.ones(len(reference))
            floor = position_nmse(half, reference) + HALF_SUM * terms
            allowed = max(BETWEEN, TIMES_HALF * float(floor.mean()))
        self.findings.append(LayerFinding(module, self._mode, done.found, done.misread, between, allowed))


def _rows(value: NDArray[np.float32]) -> NDArray[np.float32]:
    return value.reshape(len(value), -1)


def position_nmse(got: NDArray[Any], want: NDArray[Any]) -> NDArray[np.float64]:
    """Σ (got − want)² / Σ want² of each position; inf for NaN, Inf or another shape."""
    if got.shape != want.shape:
        return np.full(len(want), math.inf)
    with np.errstate(invalid="ignore", over="ignore"):
        a, b = got.astype(np.float64), want.astype(np.float64)
        error, power = ((a - b) ** 2).sum(axis=1), (b**2).sum(axis=1)
        ratio = np.divide(error, power, out=np.where(error > 0, np.inf, 0.0), where=power > 0)
    return np.where(np.isfinite(a).all(axis=1), ratio, np.inf)


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", over="ignore"):
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
