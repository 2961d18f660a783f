"""What a method of the comparison is, and what it makes: a model, what it took to train, how it is deployed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qalora_export.comparison.bench import Bench, Trained
from qalora_export.comparison.cells import Cell
from qalora_export.models.loading import load_model

Widths = tuple[int, ...]
ALL: Widths = (4, 3, 2)
UNTRAINED = Trained(None, 0, 0.0)
SIXTEEN, EXACT, NF4 = "16-bit weights", "GGUF and ONNX, exact", "NF4 and a 16-bit adapter, PyTorch"
BESIDE = "INT4 and a 16-bit adapter beside it"
GGUF = "GGUF, llama.cpp's own"


@dataclass(frozen=True, slots=True)
class Made:
    """A model ready to be scored. checkpoint: canonical, when that is what is deployed; exports are made of it.

    gguf: the file, when that is what is deployed.
    """

    model: Any
    trained: Trained
    bits_per_weight: float
    ships: str
    checkpoint: Path | None = None
    base: Path | None = None
    gguf: Path | None = None


Maker = Callable[[Bench, Cell, Path], Made]  # the folder is the cell's own and goes when it is measured
Artifact = Callable[[Bench, int | None], Path]  # bits -> a GGUF file


@dataclass(frozen=True, slots=True)
class Method:
    """bits: "16" or "nf4" for one row; "each" for a row at every bits of the recipe. trained: seeds and rates count.

    needs: as needs.py has them. widths: the only bits at which it has a row, where others tell nothing new. exact: it
    ships as a canonical checkpoint, whose exports are proven. artifact: a GGUF file of the layout that is deployed, of
    untrained numbers: what is timed, for speed does not depend on values; None for what no GGUF file is made of.
    varies: another method, of which only the start or the bits are others: it takes that row's learning rate where
    there is one.
    """

    id: str
    title: str
    bits: Literal["16", "nf4", "each"]
    trained: bool
    make: Maker
    needs: tuple[str, ...] = ()
    artifact: Artifact | None = None
    exact: bool = False
    widths: Widths = ALL
    varies: str | None = None


def bits_of(cell: Cell) -> int:
    assert cell.bits is not None
    return cell.bits


def rate_of(cell: Cell) -> float:
    assert cell.rate is not None
    return cell.rate


def canonical(bench: Bench, checkpoint: Path, trained: Trained, *, base: Path | None = None) -> Made:
    """What ships as a canonical checkpoint."""
    return Made(load_model(checkpoint), trained, bench.bits_of(checkpoint), EXACT, checkpoint, base)


@torch.no_grad()
def put(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Other weights in the named layers."""
    for name, weight in weights.items():
        model.get_submodule(name).weight.copy_(weight)
