"""The methods, one function each: what is trained, what is deployed.

A method that is not in METHODS does not exist for the recipe, the command line or the table.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.comparison import lora, lq, scales
from qalora_export.comparison.bench import Bench, Trained, plain
from qalora_export.comparison.cells import Cell
from qalora_export.models.loading import load_model
from qalora_export.qalora.merge import merge
from qalora_export.qalora.training.stage import train
from qalora_export.quantization.rtn import round_to_nearest
from qalora_export.quantization.rules import Plan
from qalora_export.quantization.stage import quantize

UNTRAINED = Trained(None, 0, 0.0)
SIXTEEN, EXACT, NF4 = "16-bit weights", "GGUF and ONNX, exact", "NF4 and a 16-bit adapter, PyTorch"
BESIDE = "INT4 and a 16-bit adapter beside it"


@dataclass(frozen=True, slots=True)
class Made:
    """A model ready to be scored. checkpoint: canonical, when that is what is deployed; exports are made of it."""

    model: Any
    trained: Trained
    bits_per_weight: float
    ships: str
    checkpoint: Path | None = None
    base: Path | None = None


Maker = Callable[[Bench, Cell, Path], Made]  # the folder is the cell's own and goes when it is measured


@dataclass(frozen=True, slots=True)
class Method:
    """bits: "16" or "nf4" for one row; "each" for a row at every bits of the recipe. trained: seeds and rates count."""

    id: str
    title: str
    bits: Literal["16", "nf4", "each"]
    trained: bool
    make: Maker


def base_16(bench: Bench, _cell: Cell, _folder: Path) -> Made:
    return Made(plain(bench.source), UNTRAINED, 16.0, SIXTEEN)


def lora_16(bench: Bench, cell: Cell, _folder: Path) -> Made:
    """16-bit LoRA, merged in float16 as it would be deployed."""
    model, trained = _lora(bench, cell)
    merged = plain(bench.source)
    _put(merged, {name: layer_weight.half().float() for name, layer_weight in _merged(model).items()})
    return Made(merged, trained, 16.0, SIXTEEN)


def rtn(bench: Bench, cell: Cell, _folder: Path) -> Made:
    return _canonical(bench, bench.base(_bits(cell), "rtn"), UNTRAINED)


def gptq(bench: Bench, cell: Cell, _folder: Path) -> Made:
    return _canonical(bench, bench.base(_bits(cell)), UNTRAINED)


def qlora(bench: Bench, cell: Cell, _folder: Path) -> Made:
    model, trained = _lora(bench, cell, nf4=True)
    return Made(model, trained, lora.NF4_BITS + lora.adapter_bits(model, bench.weights), NF4)


def qlora_gptq(bench: Bench, cell: Cell, folder: Path) -> Made:
    """QLoRA merged into 16 bits, then quantized anew: what people do to ship it."""
    merged, trained = _merged_qlora(bench, cell)
    checkpoint = folder / "merged.qalora"
    quantize(merged, checkpoint, bench.quantization(_bits(cell)))
    return _canonical(bench, checkpoint, trained)


def qa_lora(bench: Bench, cell: Cell, folder: Path) -> Made:
    """The paper's: an adapter on the offsets, merged without loss."""
    base, adapter, merged = bench.base(_bits(cell)), folder / "adapter", folder / "merged.qalora"
    report = train(base, adapter, bench.settings(cell.seed, _rate(cell)))
    merge(base, adapter, merged)
    trained = Trained(report.best_loss, report.trainable_parameters, report.seconds)
    return _canonical(bench, merged, trained, base=base)


def qa_lora_plus(bench: Bench, cell: Cell, folder: Path) -> Made:
    """Scales and offsets, each with half of the rank, so that the parameters are those of QA-LoRA."""
    base, merged = bench.base(_bits(cell)), folder / "merged.qalora"
    model, settings = load_model(base), bench.recipe.train
    rank = max(1, settings.rank // 2)
    scales.attach_scales(model, base, bench.modules, rank=rank, alpha=settings.alpha / 2, seed=cell.seed)
    trained = bench.fit(model, cell.seed, _rate(cell))
    scales.write_merged(model, base, merged)
    return _canonical(bench, merged, trained)


def lq_lora(bench: Bench, cell: Cell, _folder: Path) -> Made:
    """W = Q + L₁L₂; Q stays on our grid at the same bits and groups, the 16-bit adapter beside it."""
    return _lq(bench, cell, {})


def lq_lora_fisher(bench: Bench, cell: Cell, _folder: Path) -> Made:
    """The same, every row and column weighing by its Fisher information on the training data."""
    return _lq(bench, cell, bench.importance)


METHODS = {
    method.id: method
    for method in (
        Method("base", "16-bit base", "16", False, base_16),
        Method("lora", "16-bit LoRA, merged", "16", True, lora_16),
        Method("rtn", "base, round to nearest", "each", False, rtn),
        Method("gptq", "base, GPTQ", "each", False, gptq),
        Method("qlora", "QLoRA, unmerged", "nf4", True, qlora),
        Method("qlora+gptq", "QLoRA merged, then GPTQ", "each", True, qlora_gptq),
        Method("lq-lora", "LQ-LoRA, unmerged", "each", True, lq_lora),
        Method("lq-lora-fisher", "LQ-LoRA by Fisher information", "each", True, lq_lora_fisher),
        Method("qa-lora", "QA-LoRA", "each", True, qa_lora),
        Method("qa-lora+", "QA-LoRA+ (scales too)", "each", True, qa_lora_plus),
    )
}


def _bits(cell: Cell) -> int:
    assert cell.bits is not None
    return cell.bits


def _rate(cell: Cell) -> float:
    assert cell.rate is not None
    return cell.rate


def _lora(bench: Bench, cell: Cell, *, nf4: bool = False) -> tuple[Any, Trained]:
    model = plain(bench.source)
    if nf4:
        lora.to_nf4(model, bench.modules)
    lora.add_adapters(model, bench.modules, bench.recipe.train, cell.seed)
    return model, bench.fit(model, cell.seed, _rate(cell))


def _merged_qlora(bench: Bench, cell: Cell) -> tuple[Path, Trained]:
    """A folder with QLoRA merged in float16; trained once for every width it is quantized to."""
    folder = bench.work / f"qlora.seed{cell.seed}.lr{_rate(cell):g}"
    if folder not in bench.merged:
        model, trained = _lora(bench, cell, nf4=True)
        _save(bench.source, _merged(model), folder)
        bench.merged[folder] = trained
    return folder, bench.merged[folder]


def _lq(bench: Bench, cell: Cell, importance: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Made:
    base = CanonicalCheckpoint(bench.base(_bits(cell)))
    model, settings = plain(bench.source), bench.recipe.train
    splits = {}
    for name in bench.modules:
        rows, columns = importance.get(name, (None, None))
        on_grid = partial(_on_grid, Plan(*base.modules[name], sym=False), name)
        weight = model.get_submodule(name).weight.data
        splits[name] = lq.split(weight, settings.rank, on_grid, rows=rows, columns=columns)
    _put(model, {name: split.quantized for name, split in splits.items()})
    lora.add_adapters(model, bench.modules, settings, cell.seed)
    for name, layer in lora.adapted(model).items():
        lora.set_adapter(layer, splits[name].a, splits[name].b)
    trained = bench.fit(model, cell.seed, _rate(cell))
    bits = bench.bits_of(base.path) + lora.adapter_bits(model, bench.weights)
    return Made(model, trained, bits, BESIDE)


def _on_grid(plan: Plan, name: str, weight: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(round_to_nearest(weight, plan, where=name).dequantize())


def _merged(model: Any) -> dict[str, torch.Tensor]:
    return {name: lora.merged_weight(layer) for name, layer in lora.adapted(model).items()}


@torch.no_grad()
def _put(model: Any, weights: dict[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        model.get_submodule(name).weight.copy_(weight)


def _save(source: Path, weights: dict[str, torch.Tensor], out: Path) -> None:
    """The source's folder with other float16 weights in the named layers."""
    model = plain(source)
    _put(model, weights)
    model.half().save_pretrained(out)
    for path in ModelFolder(source).companions():
        shutil.copy2(path, out / path.name)


def _canonical(bench: Bench, checkpoint: Path, trained: Trained, *, base: Path | None = None) -> Made:
    return Made(load_model(checkpoint), trained, bench.bits_of(checkpoint), EXACT, checkpoint, base)
