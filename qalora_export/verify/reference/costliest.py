"""Which layers the cost of int8 activations comes from, by trying: one is rounded and all others are not.

How much an output changes where its input is rounded says little: what follows may not care. So the same sequence goes
through the model once for every variant of what is rounded, and the KL divergence that a layer causes by itself is
what it costs. First whole decoder layers are tried, then the modules of the few that cost most: the work is that of one
sequence, as many times as there are decoder layers, and a few more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qalora_export.verify.metrics import following_ids, position_metrics
from qalora_export.verify.probes.probe_set import ProbeSet
from qalora_export.verify.reference.layerwise import LayerwiseModel
from qalora_export.verify.reference.logits import fixed_threads, round_to_int8

NAMED, OPENED = 3, 3  # modules that are named; decoder layers that are looked into
LAYERS = "model.layers."


@dataclass(frozen=True, slots=True)
class Costliest:
    """modules: (name, mean KL in nats when it alone is rounded), the costliest first. sequence: where this was tried.

    together: mean KL when every layer is rounded; without: when all but `modules` are.
    """

    modules: tuple[tuple[str, float], ...]
    sequence: str
    together: float
    without: float

    def describe(self) -> str:
        named = ", ".join(f"{module} ({kl:.2g} nats by itself)" for module, kl in self.modules)
        return (
            f"int8 activations cost most in {named}; tried one at a time in PyTorch on “{self.sequence}”, where all "
            f"layers cost {self.together:.2g} and all but these {self.without:.2g}"
        )


def costliest(checkpoint: Path, probes: ProbeSet, kl: NDArray[np.float64], *, threads: int) -> Costliest:
    """kl: what the shipped path cost at every position of `probes`; its dearest sequence is tried."""
    sums = np.add.reduceat(np.nan_to_num(kl, nan=np.inf), probes.starts)
    some = probes.some([int(np.argmax(sums))])
    rounded = LayerwiseModel(checkpoint).rounded
    parts: dict[str, list[str]] = {}
    for module in rounded:
        parts.setdefault(_layer_of(module), []).append(module)
    costs = dict(zip(parts, _tried(checkpoint, some, list(parts.values()), threads), strict=True))
    opened = sorted(costs, key=lambda part: -costs[part])[:OPENED]
    inside = [module for part in opened for module in parts[part]]
    by_itself = dict(zip(inside, _tried(checkpoint, some, [[module] for module in inside], threads), strict=True))
    named = sorted(by_itself.items(), key=lambda item: -item[1])[:NAMED]
    rest = [module for module in rounded if module not in dict(named)]
    together, without = _tried(checkpoint, some, [rounded, rest], threads)
    return Costliest(tuple(named), some.names[0], together, without)


def _tried(checkpoint: Path, one: ProbeSet, variants: Sequence[Sequence[str]], threads: int) -> list[float]:
    """Mean KL of each variant: the modules whose inputs are rounded. one: a single sequence.

    The variants pass each layer one after the other, so the n-th call of a module is that of the n-th variant; the
    first pass rounds nothing.
    """
    chosen, calls = [frozenset[str](), *map(frozenset, variants)], Counter[str]()

    def rounded(module: str, x: Tensor) -> Tensor:
        now = chosen[calls[module]]
        calls[module] += 1
        return round_to_int8(x) if module in now else x

    with fixed_threads(threads), torch.inference_mode():
        model = LayerwiseModel(checkpoint)
        model.change_inputs(rounded)
        (found,) = model.run([one.ids] * len(chosen), decode=False)
    exact, *others = np.split(found, len(chosen))
    following = following_ids(one.ids, one.lengths)
    return [position_metrics(exact, other, following).summary().kl_mean for other in others]


def _layer_of(module: str) -> str:
    """ "model.layers.5" for what is inside, the module itself elsewhere."""
    if not module.startswith(LAYERS):
        return module
    return LAYERS + module.removeprefix(LAYERS).partition(".")[0]
