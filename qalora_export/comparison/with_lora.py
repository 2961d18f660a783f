"""The methods whose adapter is LoRA's: beside 16 bits, NF4 or our grid (LQ-LoRA), or merged and quantized."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.comparison import k_quants, lora, lq, mixed
from qalora_export.comparison.bench import Bench, Trained, plain
from qalora_export.comparison.cells import Cell
from qalora_export.comparison.method import (
    BESIDE,
    GGUF,
    NF4,
    SIXTEEN,
    UNTRAINED,
    Made,
    bits_of,
    canonical,
    put,
    rate_of,
)
from qalora_export.formats.gguf.read import GgufContents
from qalora_export.quantization.rtn import round_to_nearest
from qalora_export.quantization.rules import Plan
from qalora_export.quantization.stage import quantize


def lora_16(bench: Bench, cell: Cell, _folder: Path) -> Made:
    """16-bit LoRA, merged in float16 as it would be deployed."""
    model, trained = _lora(bench, cell)
    merged = plain(bench.source)
    put(merged, {name: layer_weight.half().float() for name, layer_weight in _merged(model).items()})
    return Made(merged, trained, 16.0, SIXTEEN)


def qlora(bench: Bench, cell: Cell, _folder: Path) -> Made:
    model, trained = _lora(bench, cell, nf4=True)
    _keep_merged(bench, cell, model, trained)  # the rows that quantize it again do not train it again
    return Made(model, trained, lora.NF4_BITS + lora.adapter_bits(model, bench.weights), NF4)


def qlora_gptq(bench: Bench, cell: Cell, folder: Path) -> Made:
    """QLoRA merged into 16 bits, then quantized anew: what people do to ship it."""
    merged, trained = _merged_qlora(bench, cell)
    checkpoint = folder / "merged.qalora"
    quantize(merged, checkpoint, bench.quantization(bits_of(cell)))
    return canonical(bench, checkpoint, trained)


def k_quants_of_base(bench: Bench, cell: Cell, _folder: Path) -> Made:
    return _k_quants(bench, bench.k_quants(bits_of(cell)), UNTRAINED)


def qlora_k_quants(bench: Bench, cell: Cell, folder: Path) -> Made:
    """QLoRA merged into 16 bits, then handed to llama.cpp's quantizer: what most people ship."""
    merged, trained = _merged_qlora(bench, cell)
    file = k_quants.quantize_folder(merged, bench.exact_gguf, folder / "model.gguf", k_quants.K_QUANTS[bits_of(cell)])
    return _k_quants(bench, file, trained)


def lq_lora(bench: Bench, cell: Cell, _folder: Path) -> Made:
    """W = Q + L₁L₂; Q stays on our grid at the same bits and groups, the 16-bit adapter beside it."""
    return _lq(bench, cell, {}, _uniform(bench, cell))


def lq_lora_fisher(bench: Bench, cell: Cell, _folder: Path) -> Made:
    """The same, every row and column weighing by its Fisher information on the training data."""
    return _lq(bench, cell, bench.importance, _uniform(bench, cell))


def lq_lora_mixed(bench: Bench, cell: Cell, _folder: Path) -> Made:
    """The same, bits and group of every matrix chosen under the total of its uniform bits."""
    budget = mixed.spent(bench.forecast.shapes, _uniform(bench, cell))
    errors = bench.once("errors with low rank", lambda: mixed.errors_of(bench, partial(_rest, bench)))
    return _lq(bench, cell, bench.importance, mixed.allocate(errors, bench.forecast.shapes, budget))


def _uniform(bench: Bench, cell: Cell) -> dict[str, Plan]:
    return mixed.uniform(bench.modules, CanonicalCheckpoint(bench.base(bits_of(cell), "rtn")).modules)


def _rest(bench: Bench, name: str, weight: torch.Tensor, plan: Plan) -> torch.Tensor:
    """What a grid and the best low rank beside it leave; of the first turn, to be quick."""
    rows, columns = bench.importance[name]
    found = lq.split(
        weight, bench.recipe.train.rank, partial(_on_grid, plan, name), rows=rows, columns=columns, turns=1
    )
    return weight - found.quantized - found.b @ found.a


def _lora(bench: Bench, cell: Cell, *, nf4: bool = False) -> tuple[Any, Trained]:
    model = plain(bench.source)
    if nf4:
        lora.to_nf4(model, bench.modules)
    lora.add_adapters(model, bench.modules, bench.recipe.train, cell.seed)
    paged = lora.PAGED if nf4 and torch.cuda.is_available() else None
    return model, bench.fit(model, cell.seed, rate_of(cell), optimizer=paged)


def _merged_qlora(bench: Bench, cell: Cell) -> tuple[Path, Trained]:
    """A folder with QLoRA merged in float16; trained once for every width it is quantized to."""
    folder = _folder_of_merged(bench, cell)
    if folder not in bench.merged:
        _keep_merged(bench, cell, *_lora(bench, cell, nf4=True))
    return folder, bench.merged[folder]


def _keep_merged(bench: Bench, cell: Cell, model: Any, trained: Trained) -> None:
    folder = _folder_of_merged(bench, cell)
    _save(bench.source, _merged(model), folder)
    bench.merged[folder] = trained


def _folder_of_merged(bench: Bench, cell: Cell) -> Path:
    return bench.work / f"qlora.seed{cell.seed}.lr{rate_of(cell):g}"


def _lq(
    bench: Bench,
    cell: Cell,
    importance: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    plans: Mapping[str, Plan],
) -> Made:
    model, settings = plain(bench.source), bench.recipe.train
    splits = {}
    for name in bench.modules:
        rows, columns = importance.get(name, (None, None))
        weight = model.get_submodule(name).weight.data
        on_grid = partial(_on_grid, plans[name], name)
        splits[name] = lq.split(weight, settings.rank, on_grid, rows=rows, columns=columns)
    put(model, {name: split.quantized for name, split in splits.items()})
    lora.add_adapters(model, bench.modules, settings, cell.seed)
    for name, layer in lora.adapted(model).items():
        lora.set_adapter(layer, splits[name].a, splits[name].b)
    trained = bench.fit(model, cell.seed, rate_of(cell))
    bits = 8 * mixed.spent(bench.forecast.shapes, plans) / bench.weights + lora.adapter_bits(model, bench.weights)
    return Made(model, trained, bits, BESIDE)


def _on_grid(plan: Plan, name: str, weight: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(round_to_nearest(weight, plan, where=name).dequantize())


def _merged(model: Any) -> dict[str, torch.Tensor]:
    return {name: lora.merged_weight(layer) for name, layer in lora.adapted(model).items()}


def _save(source: Path, weights: dict[str, torch.Tensor], out: Path) -> None:
    """The source's folder with other float16 weights in the named layers."""
    model = plain(source)
    put(model, weights)
    model.half().save_pretrained(out)
    for path in ModelFolder(source).companions():
        shutil.copy2(path, out / path.name)


def _k_quants(bench: Bench, file: Path, trained: Trained) -> Made:
    """The values of a GGUF file in PyTorch, its embedding's included."""
    model, contents = plain(bench.source), GgufContents(file)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name in contents.types:
            weights[name].copy_(torch.tensor(contents.dequantized(name)))
    return Made(model, trained, bench.gguf_bits(file), GGUF, gguf=file)
