"""Which modules training moves: those that train.targets match, but not what adapters would make unexportable.

Left alone are modules of 8 bits that are symmetric, which no GGUF type holds once an adapter has moved their offsets,
and those on a grid without offsets of its own. A target that is the whole name of a module has it trained even so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase


def targeted(modules: Iterable[str], targets: Sequence[str], untrained: Collection[str]) -> list[str]:
    """The modules that are trained, in their order. untrained: those that are left alone (Forecast.untrained)."""
    return [
        name
        for name in modules
        if name in targets or (name not in untrained and any(fnmatchcase(name, pattern) for pattern in targets))
    ]


def left_alone(targets: Sequence[str], untrained: Collection[str]) -> tuple[str, ...]:
    """The modules that targets match and that are not trained."""
    return tuple(name for name in untrained if name not in targets and any(fnmatchcase(name, t) for t in targets))


def describe(names: Collection[str]) -> str:
    """One line of a plan: how many modules of which kind are left alone, and why."""
    kinds = Counter(name.rpartition(".")[2] for name in names)
    listed = ", ".join(kind if count == 1 else f"{count} × {kind}" for kind, count in kinds.items())
    return f"not trained: {listed}: symmetric in 8 bits or by their grid, which an adapter's offsets would not be"
