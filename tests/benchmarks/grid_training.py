"""What a grid of super-blocks costs QA-LoRA beside free scales and offsets: one base, data, steps and seeds.

    python -m tests.benchmarks.grid_training            # half an hour on two cores; --grid, --seeds, --rate: less

The base is samples/base, widened so that 256 divides its matrices (tests/benchmarks/wider.py); data and steps are those
of samples/compare/recipe.toml. Every grid takes the learning rate that is best for it by validation loss with the first
seed. Losses are nats per token of the held-out text, of the merged checkpoint. "of the gain" is what a row is behind
free scales and offsets of the same codes, as a share of what training gained there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qalora_export.comparison.bench import Bench
from qalora_export.models.loading import load_model
from qalora_export.qalora.merge import merge
from qalora_export.qalora.training.stage import train
from qalora_export.recipe import QuantizeSettings
from qalora_export.recipe_file import load_recipe
from samples.base.quality import MODEL
from tests.benchmarks.common import print_table, write_json
from tests.benchmarks.machine import RESULTS, machine
from tests.benchmarks.wider import widened

REPORT = "quantize_report.json"
RECIPE = Path(__file__).parents[2] / "samples/compare/recipe.toml"
FREE = "affine16, g 32"
# Name -> (changes to [quantize], changes to [train]). Scales beside offsets have half of the rank each.
HALF = {"scales": True, "rank": 8, "alpha": 16.0}
GRIDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    FREE: ({}, {}),
    "affine16, g 64": ({"group_size": 64}, {}),
    "q4_k": ({"grid": "q4_k"}, {}),
    "affine16, g 32, scales too": ({}, HALF),
    "q4_k, scales too": ({"grid": "q4_k"}, HALF),
}
RATES = (2e-3, 4e-3, 8e-3)


@dataclass
class Row:
    """before, losses: nats per held-out token, untrained and of every seed."""

    bits_per_weight: float
    before: float
    rate: float = 0.0
    losses: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return statistics.mean(self.losses)


class _Grids:
    def __init__(self, work: Path, options: argparse.Namespace) -> None:
        changes = {"model": str(widened(work / "model")), "train.max_steps": options.steps}
        if options.smoke:
            changes |= _little(work)
        recipe = load_recipe(RECIPE, changes)
        self.work, self.rates, self.seeds = work, options.rate or RATES, range(options.seeds)
        self.bench = Bench(recipe, Path(recipe.model), work)

    def row(self, name: str) -> Row:
        quantized, trained = GRIDS[name]
        base = self.bench.base_of(name, self._settings(quantized))
        (bits,) = {row["bits_per_weight"] for row in json.loads((base / REPORT).read_text())["modules"]}
        row = Row(bits, self._loss(base))
        found = {rate: self._train(base, trained, 0, rate) for rate in self.rates}
        row.rate = min(found, key=lambda rate: found[rate][0])
        row.losses = [found[row.rate][1], *(self._train(base, trained, seed, row.rate)[1] for seed in self.seeds[1:])]
        return row

    def _settings(self, changes: dict[str, Any]) -> QuantizeSettings:
        return QuantizeSettings(**self.bench.recipe.quantize.model_dump() | changes)

    def _train(self, base: Path, changes: dict[str, Any], seed: int, rate: float) -> tuple[float, float]:
        """(validation loss of the step that was kept, held-out loss of the merged checkpoint)."""
        adapter, merged = self.work / "adapter", self.work / "merged.qalora"
        report = train(base, adapter, self.bench.settings(seed, rate).model_copy(update=changes), force=True)
        merge(base, adapter, merged, force=True)
        assert report.best_loss is not None
        return report.best_loss, self._loss(merged)

    def _loss(self, checkpoint: Path) -> float:
        assert self.bench.text_rows is not None
        return self.bench._loss(load_model(checkpoint), self.bench.text_rows, f"held-out text of {checkpoint.name}")


def _little(work: Path) -> dict[str, Any]:
    """Settings of as little as can be: a few lines of every text, two steps of one row."""
    changes: dict[str, Any] = {"quantize.method": "rtn", "train.batch_size": 1, "train.max_steps": 2}
    for setting, name in (("train.data", "train"), ("train.validation", "validation"), ("compare.text", "text")):
        lines = (RECIPE.parent / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (work / f"{name}.jsonl").write_text("".join(lines[:8]))
        changes[setting] = str(work / f"{name}.jsonl")
    return changes


def behind(row: Row, free: Row) -> float:
    """How far a row is behind free scales and offsets, as a share of what training gained there."""
    return (row.mean - free.mean) / (free.before - free.mean)


def main(arguments: list[str] | None = None) -> None:
    options = _arguments(arguments)
    work = options.work / "grid_training"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    content = json.loads(options.json.read_text()) if options.json.exists() and options.grid else {"rows": {}}
    content |= {"benchmark": "grid_training", "machine": machine(), "base": f"{MODEL.parent.name}, widened"}
    content |= {"steps": options.steps, "seeds": options.seeds}
    try:
        grids = _Grids(work, options)
        for name in options.grid or GRIDS:
            content["rows"][name] = vars(grids.row(name))
            write_json(options.json, content)
            print(name, content["rows"][name], flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    rows = {name: Row(**content["rows"][name]) for name in GRIDS if name in content["rows"]}
    table = [
        [
            name,
            f"{row.bits_per_weight:.2f}",
            f"{row.before:.4f}",
            f"{row.mean:.4f} ± {statistics.stdev(row.losses):.4f}" if len(row.losses) > 1 else f"{row.mean:.4f}",
            f"{row.rate:g}",
            f"{100 * behind(row, rows[FREE]):.1f} %" if FREE in rows else "",
        ]
        for name, row in rows.items()
    ]
    header = ["grid", "bits per weight", "before", "trained", "rate", "behind, of the gain"]
    print_table(f"{options.steps} steps, {options.seeds} seeds; {content['machine']['cpu']}", header, table)
    print(f"written: {options.json}")


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench/work"))
    parser.add_argument("--grid", action="append", choices=GRIDS, help="the others stay as the JSON has them")
    parser.add_argument("--rate", action="append", type=float, help=f"instead of {', '.join(map(str, RATES))}")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="as little as can be: does the benchmark itself work?")
    parser.add_argument("--json", type=Path, default=RESULTS / "grid_training.json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
