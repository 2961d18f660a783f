"""The methods that train what a quantized matrix has beside its codes, and merge without loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.comparison import mixed, refit
from qalora_export.comparison.bench import Bench, Trained, plain
from qalora_export.comparison.cells import Cell
from qalora_export.comparison.method import Made, bits_of, canonical, rate_of
from qalora_export.qalora.merge import merge
from qalora_export.qalora.training.stage import train
from qalora_export.quantization.rtn import round_to_nearest
from qalora_export.quantization.rules import Plan
from qalora_export.recipe import QuantizeRule

COARSE = 128


def qa_lora(bench: Bench, cell: Cell, folder: Path) -> Made:
    """The paper's: an adapter on the offsets, merged without loss."""
    return _trained(bench, cell, folder, bench.base(bits_of(cell)))


def qa_lora_mixed(bench: Bench, cell: Cell, folder: Path) -> Made:
    """Bits of every matrix chosen under the total of its uniform bits, then QA-LoRA."""
    return _trained(bench, cell, folder, mixed_base(bench, bits_of(cell)))


def mixed_base(bench: Bench, bits: int) -> Path:
    """The base whose matrices have the bits that integer programming chose, quantized as [quantize] says.

    Groups do not grow: a matrix of L groups has an update of rank L at most, so a choice of larger ones, which the
    error before training favours, leaves the adapter less to move than it saves.
    """
    shapes = bench.forecast.shapes
    budget = mixed.spent(shapes, mixed.uniform(bench.modules, CanonicalCheckpoint(bench.base(bits, "rtn")).modules))
    choices = [plan for plan in mixed.CHOICES if plan.group_size <= bench.recipe.quantize.group_size]
    plans = mixed.allocate(bench.once("errors", lambda: mixed.errors_of(bench, _rest, choices)), shapes, budget)
    chosen = [QuantizeRule(match=name, bits=p.bits, group_size=p.group_size) for name, p in plans.items()]  # type: ignore[arg-type]  # of CHOICES
    settings = bench.quantization(bits)
    return bench.base_of(f"mixed.{bits}bit", settings.model_copy(update={"rules": (*chosen, *settings.rules)}))


def qa_lora_coarse(bench: Bench, cell: Cell, folder: Path) -> Made:
    """Groups of COARSE: fewer trainable parameters and bits, and an update of lower rank."""
    bits = bits_of(cell)
    settings = bench.quantization(bits).model_copy(update={"group_size": COARSE})
    return _trained(bench, cell, folder, bench.base_of(f"coarse.{bits}bit", settings))


def _rest(name: str, weight: Tensor, plan: Plan) -> Tensor:
    return weight - torch.from_numpy(round_to_nearest(weight, plan, where=name).dequantize())


def qa_lora_plain(bench: Bench, cell: Cell, folder: Path) -> Made:
    """From GPTQ alone, as the paper has it: nothing solved afterwards, the adapter starts at zero."""
    return _trained(bench, cell, folder, _plain_base(bench, bits_of(cell)))


def qa_lora_refit(bench: Bench, cell: Cell, folder: Path) -> Made:
    """From the same codes and scales, the offsets moved to where the Hessian wants them before training."""
    bits = bits_of(cell)
    base, start = _plain_base(bench, bits), bench.work / f"base.refit.{bits}bit.qalora"
    if not start.exists():
        model = plain(bench.source)
        weights = {name: model.get_submodule(name).weight.data for name in bench.modules}
        refit.write_refitted(base, weights, bench.hessians, start)
    return replace(_trained(bench, cell, folder, start), base=None)  # `start` is no output of quantize


def _plain_base(bench: Bench, bits: int) -> Path:
    return bench.base_of(f"plain.{bits}bit", bench.quantization(bits).model_copy(update={"sweeps": 0}))


def qa_lora_plus(bench: Bench, cell: Cell, folder: Path) -> Made:
    """Scales and offsets, each with half of the rank, so that the parameters are those of QA-LoRA."""
    settings = bench.recipe.train
    half = {"scales": True, "rank": max(1, settings.rank // 2), "alpha": settings.alpha / 2}
    return _trained(bench, cell, folder, bench.base(bits_of(cell)), half)


def _trained(bench: Bench, cell: Cell, folder: Path, base: Path, changes: Mapping[str, Any] | None = None) -> Made:
    """changes: to [train]."""
    adapter, merged = folder / "adapter", folder / "merged.qalora"
    report = train(base, adapter, bench.settings(cell.seed, rate_of(cell)).model_copy(update=changes))
    merge(base, adapter, merged)
    trained = Trained(report.best_loss, report.trainable_parameters, report.seconds)
    return canonical(bench, merged, trained, base=base)
