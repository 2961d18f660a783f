"""Every gate, found by looking through this package: a gate is added by adding its file.

    GATE = Gate("G7", "title", "what it compares", "row of the summary", (Limit(...),))

    @measures(GATE)
    def measure(target: Target) -> Entry: ...

A measuring function returns GATE.judge(…), or raises RuntimeUnavailableError, which becomes "not run". What it needs
of the run it takes from its Target; what several gates need is measured there once.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from qalora_export.verify import gates
from qalora_export.verify.rule import Entry, Gate
from qalora_export.verify.target import Target

Measure = Callable[[Target], Entry]
M = TypeVar("M", bound=Measure)


@dataclass(frozen=True, slots=True)
class Measured:
    """A gate and how it is measured."""

    gate: Gate
    measure: Measure


_REGISTERED: dict[str, Measured] = {}


def measures(gate: Gate) -> Callable[[M], M]:
    """Register the decorated function as the way to measure `gate`. Raises ValueError for an id that is taken."""

    def register(measure: M) -> M:
        if gate.id in _REGISTERED:
            raise ValueError(f"two gates are called {gate.id}")
        _REGISTERED[gate.id] = Measured(gate, measure)
        return measure

    return register


def registered() -> list[Measured]:
    """Every gate in the order in which they are run and shown: G0, G1, … G10."""
    _import_all()
    return sorted(_REGISTERED.values(), key=lambda measured: (len(measured.gate.id), measured.gate.id))


def all_gates() -> dict[str, Gate]:
    """Every gate by id, in order."""
    return {measured.gate.id: measured.gate for measured in registered()}


@cache
def _import_all() -> None:
    for module in pkgutil.iter_modules(gates.__path__):
        importlib.import_module(f"{gates.__name__}.{module.name}")
