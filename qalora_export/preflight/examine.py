"""The checks of every stage that will run, in the order of the line; all of them are made, whatever the first finds."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qalora_export.checkpoint.forecast import Forecast
from qalora_export.errors import InputError
from qalora_export.memory import bytes_text
from qalora_export.models.families import family_of
from qalora_export.models.families.family import Format
from qalora_export.preflight import estimates
from qalora_export.preflight.estimates import StageForecast
from qalora_export.preflight.findings import Findings
from qalora_export.preflight.machine import Machine, gpu_note, measure
from qalora_export.qalora.targets import describe, left_alone, targeted
from qalora_export.recipe import EvaluateSettings, Recipe

SPARE = 1.1  # of the disk: file systems and estimates are not exact


@dataclass(frozen=True, slots=True)
class Preflight:
    """stages: by name, those that will run. machine: as measured. notes: what a user may want to know."""

    stages: dict[str, StageForecast]
    machine: Machine
    notes: tuple[str, ...]

    @property
    def needed(self) -> int:
        """Bytes the run needs on the disk at most."""
        return estimates.needed(self.stages)

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages.values())


def examine(recipe: Recipe, pending: Collection[str], findings: Findings) -> Preflight | None:
    """Check the stages named in `pending`; what would stop one of them goes into `findings`.

    Nothing is written but scratch files that are gone at the end. None when there is no model to check them with.
    """
    out = Path(recipe.out)
    machine = None
    with findings.during("run"):
        machine = measure(out)
    with tempfile.TemporaryDirectory(prefix="qalora-check-") as scratch, contextlib.ExitStack() as stack:
        forecast = None
        findings.aliases[scratch] = recipe.model
        if pending:
            with findings.during("quantize"):
                forecast = stack.enter_context(_base(recipe, "quantize" in pending, Path(scratch)))
        if forecast is None or machine is None:
            if pending and forecast is None:
                _without_model(recipe, pending, findings)
            return None if machine is None else Preflight({}, machine, tuple(findings.notes))
        for note in (*forecast.notes, forecast.mix(), _left(forecast), gpu_note(machine)):
            findings.note(note)
        from qalora_export.models.loading import tokenizers_loaded_once

        with tokenizers_loaded_once():
            found = _Checks(recipe, pending, forecast, machine, findings).run()
    result = Preflight({name: found[name] for name in pending if name in found}, machine, tuple(findings.notes))
    _check_room(result, recipe, findings)
    return replace(result, notes=tuple(findings.notes))


@contextlib.contextmanager
def _base(recipe: Recipe, quantizes: bool, scratch: Path) -> Iterator[Forecast]:
    """The base that is there, or what quantize will make of the model."""
    if quantizes:
        from qalora_export.quantization.check import open_forecast

        with open_forecast(recipe.model, recipe.quantize, scratch, revision=recipe.revision) as forecast:
            yield forecast
    else:
        from qalora_export.checkpoint.canonical import CanonicalCheckpoint

        yield Forecast.of(CanonicalCheckpoint(Path(recipe.out) / "base.qalora"))


def _left(forecast: Forecast) -> str:
    """Which matrices are not quantized, by kind."""
    plain = {name.removesuffix(".weight"): entry for name, entry in forecast.plain.items()}
    matrices = {name: e for name, e in plain.items() if len(e.shape) == 2 and name not in forecast.embeddings}
    kinds = Counter(name.rpartition(".")[2] for name in matrices)
    listed = ", ".join(kind if count == 1 else f"{count} × {kind}" for kind, count in kinds.items())
    values = sum(math.prod(entry.shape) for entry in matrices.values())
    dtypes = " and ".join(sorted({entry.dtype.name for entry in matrices.values()}))
    return f"not quantized: {listed} ({values:,} weights, {dtypes})" if matrices else "every matrix is quantized"


def _without_model(recipe: Recipe, pending: Collection[str], findings: Findings) -> None:
    """What can be said when the model cannot be opened: whether every data file parses, and the runtimes."""
    for stage in ("quantize", "train", "evaluate base", "evaluate merged", "verify-parity"):
        if stage in pending:
            _every_line(recipe, stage, findings)
    if "verify-parity" in pending:
        _runtimes(recipe, findings)


def _every_line(recipe: Recipe, stage: str, findings: Findings) -> None:
    """Every line of the stage's files that cannot be used; a stage itself stops at the first."""
    from qalora_export.data.records import Record, in_one, unusable

    train, evaluate = recipe.train, recipe.evaluate
    learned: dict[str, Any] = {"need": Record.need_answer, "format": train.format}
    score: list[tuple[str | None, dict[str, Any]]] = []
    if evaluate is not None:
        score = [(evaluate.data, {"need": Record.expected, "limit": evaluate.limit})]
    files: dict[str, list[tuple[str | None, dict[str, Any]]]] = {
        "quantize": [(recipe.quantize.calibration if recipe.quantize.method == "gptq" else None, {})],
        "train": [(train.data, learned), (train.validation, learned)],
        "evaluate base": score,
        "evaluate merged": score,
        "verify-parity": [(recipe.verify.prompts, {})],
    }
    for path, options in files.get(stage, []):
        if path is not None:
            with findings.during(stage):
                if bad := unusable(Path(path), **options):
                    findings.replace(stage, bad, in_one(Path(path), bad))


@dataclass(slots=True)
class _Checks:
    recipe: Recipe
    pending: Collection[str]
    forecast: Forecast
    machine: Machine
    findings: Findings

    def run(self) -> dict[str, StageForecast]:
        found: dict[str, StageForecast] = {}
        size, machine = self.forecast, self.machine
        steps = {
            "quantize": self._quantize,
            "train": self._train,
            "merge": lambda: estimates.merge(size, machine),
            "evaluate base": self._evaluate,
            "evaluate merged": self._evaluate,
            "export gguf": self._gguf,
            "export onnx": self._onnx,
        }
        for name, step in steps.items():
            if name in self.pending:
                with self.findings.during(name):
                    if (made := step()) is not None:
                        found[name] = made
                if self.findings.of(name):
                    _every_line(self.recipe, name, self.findings)
        if "verify-parity" in self.pending:
            artifacts = {name.rpartition(" ")[2]: s.disk for name, s in found.items() if name.startswith("export ")}
            with self.findings.during("verify-parity"):
                found["verify-parity"] = self._verify(artifacts)
            if self.findings.of("verify-parity"):
                _every_line(self.recipe, "verify-parity", self.findings)
        return found

    def _quantize(self) -> StageForecast:
        from qalora_export.quantization.check import calibrated

        forecast = calibrated(self.forecast, self.recipe.quantize)
        return estimates.quantize(forecast, self.recipe.quantize, self.machine)

    def _train(self) -> StageForecast | None:
        from qalora_export.data.samples import SampleSet
        from qalora_export.qalora.training.plan import check_machine, data_files, planned, read_data

        settings, data, findings = self.recipe.train, dict[str, SampleSet](), self.findings
        with findings.during("train"):
            check_machine(settings)
        for name in data_files(settings):
            with findings.during("train"):
                data[name] = read_data(self.forecast, settings, name)
        if "data" not in data:
            return None
        made = planned(self.forecast, settings, data)
        if alone := left_alone(settings.targets, made.untrained):
            findings.note(describe(alone))
        for name, account in made.accounts.items():
            if account.lines:
                findings.note(f"train.{name}: {account.describe()}")
        return estimates.train(self.forecast, made, self.machine)

    def _evaluate(self) -> StageForecast:
        settings = self.recipe.evaluate
        assert settings is not None
        return estimates.evaluate(self.forecast, settings, self._questions(settings), self.machine)

    def _questions(self, settings: EvaluateSettings) -> list[int]:
        """Tokens of every prompt."""
        from qalora_export.evaluation import questions
        from qalora_export.models.loading import load_tokenizer

        prompts = questions(load_tokenizer(self.forecast.path), settings, context=self.forecast.context)
        return [len(ids) for ids, _ in prompts]

    def _gguf(self) -> StageForecast:
        from qalora_export.formats.gguf.check import check_gguf

        assert self.recipe.export.gguf is not None
        self._tell_bound("gguf")
        targets = self.recipe.train.targets
        trained = targeted(self.forecast.modules, targets, self.forecast.untrained)
        return estimates.export(check_gguf(self.forecast, self.recipe.export.gguf, trained), self.machine)

    def _onnx(self) -> StageForecast:
        from qalora_export.formats.onnx.check import check_onnx

        self._tell_bound("onnx")
        return estimates.export(check_onnx(self.forecast), self.machine)

    def _tell_bound(self, fmt: Format) -> None:
        """The plan says where the context of an export ends before the model's own."""
        config = self.forecast.config
        if (bound := family_of(config).bound(config, fmt)) is not None:
            self.findings.note(f"export {fmt}: {bound}")

    def _verify(self, artifacts: dict[str, int]) -> StageForecast:
        from qalora_export.verify.check import check_probes

        runtimes = _runtimes(self.recipe, self.findings)
        probes, asked = check_probes(self.forecast, self.recipe.verify, runtimes, artifacts), self.recipe.evaluate
        seconds = 0.0
        if asked is not None:
            prompts = self._questions(asked)[: self.recipe.verify.scored]
            seconds = estimates.answering(self.forecast, asked, prompts, self.machine)
        return estimates.verify(self.forecast, probes, runtimes, self.machine, answers=seconds)


def _runtimes(recipe: Recipe, findings: Findings) -> list[str]:
    """The runtimes that will be verified, every one of them tried."""
    from qalora_export.verify.check import check_runtime, untried_version, wanted_runtimes

    formats = {name for name in ("gguf", "onnx") if getattr(recipe.export, name) is not None}
    wanted = list[str]()
    with findings.during("verify-parity"):
        wanted = wanted_runtimes(recipe.verify, formats)
    for name in wanted:
        with findings.during("verify-parity"):
            check_runtime(name)
            if note := untried_version(name):
                findings.note(note)
    return wanted


def _check_room(made: Preflight, recipe: Recipe, findings: Findings) -> None:
    """The disk must hold everything; memory and the GPU must hold every stage."""
    machine = made.machine
    if made.needed * SPARE > machine.free:
        error = InputError(
            f"the run needs about {bytes_text(made.needed)} of disk, {bytes_text(machine.free)} are free",
            where=recipe.out,
            why=", ".join(
                f"{name} {bytes_text(stage.disk)}" for name, stage in made.stages.items() if stage.disk > 2**20
            ),
            fix="make room, or choose an `out` on another disk",
        )
        findings.add("run", error)
    for name, stage in made.stages.items():
        if stage.memory is None or stage.on_gpu or machine.memory is None:
            continue
        needs = f"{name} needs about {bytes_text(stage.memory)} of memory"
        if stage.memory > machine.memory:
            error = InputError(
                f"{needs}, this machine has {bytes_text(machine.memory)}",
                where=recipe.out,
                why=stage.detail,
                fix="take a smaller batch, shorter sequences or a larger machine; a single stage's own command does "
                "not ask how much memory there is",
            )
            findings.add(name, error)
        elif machine.memory_free is not None and stage.memory > machine.memory_free:
            findings.note(
                f"{needs}, {bytes_text(machine.memory_free)} are free now: close other programs, or it may be slow"
            )
