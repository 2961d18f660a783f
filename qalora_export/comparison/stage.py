"""The comparison: every cell once, one JSON file each, then the table, the claims and the plot.

<out>/cells/<method>.<bits>bit.seed<n>.lr<rate>.json     kept from run to run while nothing that decides it changes
<out>/comparison.json  comparison.md  comparison.png     made anew by every run
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from qalora_export.checkpoint.output import claim_output
from qalora_export.comparison.bench import Bench, Score
from qalora_export.comparison.cells import Cell, Measured, read, write
from qalora_export.comparison.claims import Claim, judged
from qalora_export.comparison.method import EXACT, GGUF, Made, Method, rate_of
from qalora_export.comparison.methods import METHODS
from qalora_export.comparison.needs import require
from qalora_export.comparison.plot import plot_rows
from qalora_export.comparison.proof import Proof, proof_of
from qalora_export.comparison.speed import Speeds
from qalora_export.comparison.table import Row, best_rate, confirmed, markdown, row_of
from qalora_export.errors import DivergedError, InputError, did_you_mean
from qalora_export.models.sources import locate
from qalora_export.progress import task
from qalora_export.recipe import Recipe
from qalora_export.safety import atomic_file, local_path, refuse_existing, regular_file, sha256_bytes, sha256_file
from qalora_export.stage_keys import stage_key
from qalora_export.version import __version__

logger = logging.getLogger(__name__)
CELLS, WORK, RECORD, TABLE, PLOT = "cells", "work", "comparison.json", "comparison.md", "comparison.png"
LOOKED = 3  # learning rates that the search for the best one mostly trains: it and its neighbours
BENCH = re.compile(r"[0-9a-f]{16}")  # folder of one comparison in WORK


@dataclass(frozen=True, slots=True)
class ComparisonReport:
    """rows: in the order of METHODS, widest first. claims: of the papers and of ours, judged by the rows.

    made, kept: cells trained or scored now, and taken from an earlier run.
    """

    out: str
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]
    made: int
    kept: int


def compare(recipe: Recipe, *, force: bool = False) -> ComparisonReport:
    """Train and score every method of recipe.compare; a killed run goes on where it was.

    force: measure every cell anew. Raises InputError for a recipe without held-out data or validation data or with an
    unknown method, and what needs.require does, before anything is made.
    """
    out, methods = local_path(recipe.out), _methods(recipe)
    _require_files(recipe)
    require(recipe, methods)
    source = locate(recipe.model, recipe.revision).path
    inputs = (source, recipe.train.data, recipe.train.validation, recipe.quantize.calibration, recipe.compare.text)
    with contextlib.ExitStack() as stack:
        out.mkdir(parents=True, exist_ok=True)
        stack.enter_context(claim_output(out / RECORD, force=True, inputs=inputs))
        for name in (TABLE, PLOT):  # ours where the record is, which is written before them
            refuse_existing(out / name, force=(out / RECORD).exists())
        made_of = _made_of(recipe, source)
        # What a killed run of other data or settings left in its folder is no base of this one.
        bench = Bench(recipe, source, out / WORK / made_of[:16])
        run = _Run(bench, out / CELLS, made_of, force)
        rows = run.rows(methods)
        report = ComparisonReport(str(out), tuple(rows), tuple(judged(rows)), run.made, run.kept)
        _write(out, report)
        _clean(out / WORK)
    return report


def _require_files(recipe: Recipe) -> None:
    files = {
        "[train] data": recipe.train.data,
        "[train] validation": recipe.train.validation,
        "[evaluate] data": None if recipe.evaluate is None else recipe.evaluate.data,
        "[compare] text": recipe.compare.text,
    }
    for setting, file in files.items():
        if file is not None:
            regular_file(
                Path(file), f"{setting} file", fix="correct the path in the recipe; it starts at the recipe's folder"
            )


def _clean(work: Path) -> None:
    """Delete what comparisons left in `work`, of other settings too, and nothing that somebody else put there."""
    for path in list(work.iterdir()) if work.is_dir() else ():
        if BENCH.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        work.rmdir()


def _methods(recipe: Recipe) -> list[Method]:
    asked = recipe.compare.methods or tuple(METHODS)
    for name in asked:
        if name not in METHODS:
            fix = did_you_mean(name, METHODS)
            raise InputError(f"no method is called {name!r}", where="[compare] methods", fix=fix)
        if recipe.compare.methods and not _widths(METHODS[name], recipe.compare.bits):
            raise InputError(
                f"the method {name!r} has no row at these bits",
                where="[compare] bits",
                why=f"its rows are at {' and '.join(map(str, METHODS[name].widths))} bits",
                fix="ask for one of these, or leave the method out",
            )
    return [method for method in METHODS.values() if method.id in asked]


def _made_of(recipe: Recipe, source: Path) -> str:
    """Hash of what decides every cell's numbers: model, settings, data, our code and the packages it goes through."""
    tables = {"train": recipe.train, "quantize": recipe.quantize, "evaluate": recipe.evaluate}
    places = {"data", "validation", "calibration"}
    parts = [stage_key("compare", [source], None)]
    for name, table in tables.items():
        files = [getattr(table, place, None) for place in sorted(places)]
        parts += ["" if file is None else sha256_file(Path(file)) for file in files]
        parts.append(f"{name} {'' if table is None else table.model_dump_json(exclude=places)}")
    parts.append("" if recipe.compare.text is None else sha256_file(Path(recipe.compare.text)))
    return sha256_bytes("\n".join(parts).encode())


@dataclass
class _Run:
    bench: Bench
    cells: Path
    made_of: str
    force: bool
    made: int = 0
    kept: int = 0
    rates: dict[tuple[str, int | None], float] = field(default_factory=dict)  # the best of every trained row

    @cached_property
    def speeds(self) -> Speeds:
        return Speeds(self.bench)

    def rows(self, methods: list[Method]) -> list[Row]:
        asked = self.bench.recipe.compare
        wanted = [(method, bits) for method in methods for bits in _widths(method, asked.bits)]
        planned = [self._planned(method, bits) for method, bits in wanted]
        with task("compare, models", sum(planned)) as shown:
            rows = []
            for index, (method, bits) in enumerate(wanted):
                shown.update(sum(planned[:index]), f"{method.title}, {bits or 16} bits")
                with self.bench.scratch("row") as folder:
                    rows.append(row_of(method.title, _OneRow(self, method, bits, folder).seeds()))
            shown.update(sum(planned))
        return rows

    def _planned(self, method: Method, bits: int | None) -> int:
        """How many models a row takes, so that the time left can be told: none where an earlier run has measured it."""
        asked = self.bench.recipe.compare
        last = Cell(method.id, bits, (asked.seeds if method.trained else asked.seeds[:1])[-1], None)
        if not self.force and any(read(path, self.made_of) for path in self.cells.glob(f"{last.name}*.json")):
            return 0
        searched = 1 if method.varies else min(len(asked.learning_rates), LOOKED)
        return searched + len(asked.seeds) - 1 if method.trained else 1

    def read(self, cell: Cell) -> Measured | None:
        found = None if self.force else read(self._file(cell), self.made_of)
        self.kept += found is not None
        return found

    def write(self, measured: Measured) -> Measured:
        path = self._file(measured.cell)
        path.parent.mkdir(exist_ok=True)
        write(path, measured, self.made_of)
        return measured

    def _file(self, cell: Cell) -> Path:
        return self.cells / f"{cell.name}.json"


@dataclass
class _OneRow:
    """One method at one width. folder: keeps what its cells wrote until the row is done."""

    run: _Run
    method: Method
    bits: int | None
    folder: Path
    written: dict[Cell, Made] = field(default_factory=dict)  # without their models

    def seeds(self) -> list[Measured]:
        """One cell per seed at the best learning rate, the first seed's proven and timed."""
        asked = self.run.bench.recipe.compare
        cells = self._trained() if self.method.trained else [self._measured(asked.seeds[0], None)]
        best = cells[0]
        unproven = best.gates is None if best.ships == EXACT else best.ships == GGUF and best.answered is None
        if asked.prove and unproven and (proof := self._proof(best.cell)) is not None:
            best = self.run.write(replace(best, gates=proof.gates, answered=proof.answered))
        if asked.speed and best.speed is None and self.method.artifact is not None:
            best = self.run.write(replace(best, speed=self.run.speeds.of(self.method.artifact, self.bits)))
        return [best, *cells[1:]]

    def _trained(self) -> list[Measured]:
        """The first seed looks for the rate, or it is that of the row that this one varies; the others confirm it."""
        asked = self.run.bench.recipe.compare
        known = self.run.rates.get((self.method.varies or "", self.bits))
        rates = asked.learning_rates if known is None else (known,)
        tried: dict[float, Measured] = {}

        def first(rate: float) -> Measured:
            tried[rate] = self._measured(asked.seeds[0], rate)
            return tried[rate]

        best = rate_of(best_rate(rates, first).cell)
        cells = confirmed(best, tried, lambda rate: [self._measured(seed, rate) for seed in asked.seeds[1:]])
        self.run.rates[self.method.id, self.bits] = rate_of(cells[0].cell)
        return cells

    def _measured(self, seed: int, rate: float | None) -> Measured:
        cell = Cell(self.method.id, self.bits, seed, rate)
        found = self.run.read(cell)
        if found is not None:
            return found
        logger.info("compare: %s", cell.name)
        self.run.made += 1
        try:
            made = self._make(cell)
        except DivergedError:
            return self.run.write(Measured(cell, None, None, None, None, 0.0, 0, 0.0, "diverged"))
        score = self.run.bench.score(made.model, cell.name)
        return self.run.write(_record(cell, made, score))

    def _make(self, cell: Cell) -> Made:
        folder = self.folder / cell.name
        folder.mkdir(exist_ok=True)
        made = self.method.make(self.run.bench, cell, folder)
        self.written[cell] = replace(made, model=None)
        return made

    def _proof(self, cell: Cell) -> Proof | None:
        """Of a cell that was kept from an earlier run the model is made again."""
        made = self.written.get(cell) or self._make(cell)
        return proof_of(self.run.bench, made, self.folder / cell.name)


def _record(cell: Cell, made: Made, score: Score) -> Measured:
    trained = made.trained
    return Measured(
        cell,
        score.held_out_loss,
        trained.validation_loss,
        score.exact,
        score.total,
        made.bits_per_weight,
        trained.trainable,
        trained.seconds,
        made.ships,
        text_loss=score.text_loss,
    )


def _widths(method: Method, bits: tuple[int, ...]) -> tuple[int | None, ...]:
    if method.bits != "each":
        return (None,)
    return tuple(each for each in sorted(bits, reverse=True) if each in method.widths)


def _write(out: Path, report: ComparisonReport) -> None:
    content: dict[str, Any] = {"format": "qalora-comparison/1", "version": __version__} | asdict(report)
    with atomic_file(out / RECORD, force=True) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    lines = [f"* {claim.text}: **{claim.verdict}** ({claim.figure})" for claim in report.claims]
    with atomic_file(out / TABLE, force=True) as temporary:
        temporary.write_text(markdown(report.rows) + "\n" + "\n".join(lines) + "\n", "utf-8")
    plot_rows(out / PLOT, report.rows)
