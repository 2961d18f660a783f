"""The methods that train what a quantized matrix has beside its codes, and merge without loss."""

from __future__ import annotations

from pathlib import Path

from qalora_export.comparison import scales
from qalora_export.comparison.bench import Bench, Trained
from qalora_export.comparison.cells import Cell
from qalora_export.comparison.method import Made, bits_of, canonical, rate_of
from qalora_export.models.loading import load_model
from qalora_export.qalora.merge import merge
from qalora_export.qalora.training.stage import train


def qa_lora(bench: Bench, cell: Cell, folder: Path) -> Made:
    """The paper's: an adapter on the offsets, merged without loss."""
    return _trained(bench, cell, folder, bench.base(bits_of(cell)))


def qa_lora_plus(bench: Bench, cell: Cell, folder: Path) -> Made:
    """Scales and offsets, each with half of the rank, so that the parameters are those of QA-LoRA."""
    base, merged = bench.base(bits_of(cell)), folder / "merged.qalora"
    model, settings = load_model(base), bench.recipe.train
    rank = max(1, settings.rank // 2)
    scales.attach_scales(model, base, bench.modules, rank=rank, alpha=settings.alpha / 2, seed=cell.seed)
    trained = bench.fit(model, cell.seed, rate_of(cell))
    scales.write_merged(model, base, merged)
    return canonical(bench, merged, trained)


def _trained(bench: Bench, cell: Cell, folder: Path, base: Path) -> Made:
    adapter, merged = folder / "adapter", folder / "merged.qalora"
    report = train(base, adapter, bench.settings(cell.seed, rate_of(cell)))
    merge(base, adapter, merged)
    trained = Trained(report.best_loss, report.trainable_parameters, report.seconds)
    return canonical(bench, merged, trained, base=base)
