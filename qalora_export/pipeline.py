"""`run recipe.toml`: every stage from one file, each skipped when nothing it depends on has changed.

A stage's key is the sha256 of its inputs' hashes, its settings and the code version. run.json records, per stage, the
key and the hash of the output. A stage is skipped when its key is recorded as done and its output is still intact;
otherwise it runs again. The key is recorded as started before the stage writes anything, so a killed run knows which
outputs are its own to replace.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_export.checkpoint.manifest import MANIFEST, parent_of, verify_files, verify_manifest
from qalora_export.checkpoint.sidecar import sidecar_path
from qalora_export.errors import ExitCode, InputError, ParityError, RuntimeUnavailableError
from qalora_export.model_card import write_card
from qalora_export.recipe import EvaluateSettings, Recipe, Settings, dump_toml, load_recipe
from qalora_export.safety import (
    StrPath,
    atomic_file,
    could_not_write,
    read_json,
    sha256_bytes,
    sha256_file,
    single_writer,
    sweep,
)

if TYPE_CHECKING:
    from qalora_export.verify.report.parity_report import ParityReport

STATE = "run.json"
RESOLVED = "recipe.resolved.toml"
VERIFY = "verify-parity"
logger = logging.getLogger(__name__)
OnStage = Callable[[str, Any], None]  # name of a stage and the report that it returned


@dataclass(frozen=True, slots=True)
class Stage:
    """One step: what it reads, its settings, what it writes, and how."""

    name: str
    inputs: tuple[Path, ...]
    settings: Settings | None
    output: Path
    action: Callable[[bool], Any]  # argument: replace what is there


@dataclass(frozen=True, slots=True)
class RunReport:
    """What `run` did: names of stages that ran and that were skipped, and the folder of the artifacts.

    reports: what each stage that ran returned, by its name.
    """

    out: Path
    ran: tuple[str, ...]
    skipped: tuple[str, ...]
    reports: dict[str, Any]


def run(recipe: Recipe | StrPath, *, force: bool = False, on_stage: OnStage | None = None) -> RunReport:
    """Run every stage of a recipe (an object, or the path of its TOML file), resuming where an earlier run stopped.

    on_stage is called with name and report when a stage has run, also when parity failed.

    Raises InputError when an output exists that no earlier run of this folder made (unless `force`), ParityError when
    verify-parity fails, and whatever a stage raises.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(Path(recipe))
    out = Path(recipe.out)
    with could_not_write(out):
        out.mkdir(parents=True, exist_ok=True)
    with single_writer(out):
        report = _run(recipe, out, force=force, on_stage=on_stage or (lambda *_: None))
        sweep(out)
    return report


def _run(recipe: Recipe, out: Path, *, force: bool, on_stage: OnStage) -> RunReport:
    with atomic_file(out / RESOLVED, force=True) as temporary:
        temporary.write_text(dump_toml(recipe), encoding="utf-8")
    state = _State(out / STATE)
    reports, skipped = dict[str, Any](), list[str]()
    stages = plan(recipe)
    for number, stage in enumerate(stages, 1):
        key = _key(stage)
        place = f"[{number}/{len(stages)}]"
        if not force and state.done(stage, key):
            logger.info("%s %s: up to date, %s", place, stage.name, stage.output)
            skipped.append(stage.name)
            continue
        ours = force or state.owns(stage)
        if stage.output.exists() and not ours:
            raise InputError(
                "an output exists that this run did not make",
                where=stage.output,
                fix="choose another `out`, delete it, or pass --force",
            )
        logger.info("%s %s → %s", place, stage.name, stage.output)
        state.record(stage, key, output_hash=None)
        reports[stage.name] = stage.action(ours)
        on_stage(stage.name, reports[stage.name])
        if stage.name == VERIFY:
            _require_pass(reports[stage.name])
        state.record(stage, key, output_hash=_output_hash(stage.output))
    write_card(recipe)
    return RunReport(out, tuple(reports), tuple(skipped), reports)


def plan(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe in order, with paths under recipe.out."""
    from qalora_export.formats.gguf.export import export_gguf
    from qalora_export.formats.onnx.export import export_onnx
    from qalora_export.models.sources import locate
    from qalora_export.qalora.merge import merge
    from qalora_export.qalora.training.stage import train
    from qalora_export.quantization.stage import quantize
    from qalora_export.verify.stage import verify_parity

    out, source = Path(recipe.out), locate(recipe.model, recipe.revision)
    base, adapter, merged = out / "base.qalora", out / "adapter", out / "merged.qalora"
    gguf = out / "model.gguf" if recipe.export.gguf else None
    onnx = out / "onnx" if recipe.export.onnx else None
    q, t, v = recipe.quantize, recipe.train, recipe.verify
    stages = [
        Stage(
            "quantize",
            _files(source.path, q.calibration),
            q,
            base,
            lambda f: quantize(recipe.model, base, q, force=f, revision=source.commit),
        ),
        Stage("train", _files(base, t.data, t.validation), t, adapter, lambda f: train(base, adapter, t, force=f)),
        Stage("merge", (base, adapter), None, merged, lambda f: merge(base, adapter, merged, force=f)),
    ]
    if recipe.evaluate is not None:
        e = recipe.evaluate
        stages += [_score_stage("evaluate base", base, e, out), _score_stage("evaluate merged", merged, e, out)]
    if recipe.export.gguf is not None and gguf is not None:
        g = recipe.export.gguf
        stages.append(Stage("export gguf", (merged,), g, gguf, lambda f: export_gguf(merged, gguf, g, force=f)))
    if recipe.export.onnx is not None and onnx is not None:
        o = recipe.export.onnx
        stages.append(Stage("export onnx", (merged,), o, onnx, lambda f: export_onnx(merged, onnx, o, force=f)))
    artifacts = tuple(path for path in (gguf, onnx) if path is not None)
    if artifacts:
        report = out / "report"
        stages.append(
            Stage(
                VERIFY,
                (*_files(merged, v.prompts), base, *artifacts),
                v,
                report,
                lambda f: verify_parity(merged, report, v, gguf=gguf, onnx=onnx, base=base, force=f),
            )
        )
    return stages


def _score_stage(name: str, model: Path, settings: EvaluateSettings, out: Path) -> Stage:
    from qalora_export.evaluation import evaluate

    target = out / f"score.{model.name.removesuffix('.qalora')}.json"
    return Stage(
        name, _files(model, settings.data), settings, target, lambda f: evaluate(model, settings, target, force=f)
    )


def _require_pass(report: ParityReport) -> None:
    """Raises the exception of the report's exit code."""
    if report.exit_code == ExitCode.PARITY_FAILED:
        raise ParityError(
            "the artifacts do not hold the numbers of the checkpoint",
            where=report.out,
            fix="report.json names gate, tensor and position; report.html has the plots",
        )
    if report.exit_code == ExitCode.RUNTIME_UNAVAILABLE:
        raise RuntimeUnavailableError(
            "a requested runtime is missing or crashed: this run is not a pass",
            where=report.out,
            fix="install it, or name the runtimes you ship in [verify] runtimes",
        )


def _files(*paths: Path | str | None) -> tuple[Path, ...]:
    return tuple(Path(path) for path in paths if path is not None)


def _key(stage: Stage) -> str:
    settings = stage.settings.model_dump(mode="json") if stage.settings else {}
    for name, value in settings.items():  # a path is what it holds, not where it lies
        if isinstance(value, str) and Path(value) in stage.inputs:
            settings[name] = "input"
    content = {
        "stage": stage.name,
        "settings": settings,
        "code": code_version(),
        "inputs": [_input_hash(path) for path in stage.inputs],
    }
    return sha256_bytes(json.dumps(content, sort_keys=True).encode())


@cache
def code_version() -> str:
    """sha256 over every source file of this package: any change of code runs the stages again."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _input_hash(path: Path) -> str:
    if path.is_dir():
        return parent_of(path, "input").sha256
    if not path.is_file():
        raise InputError("input not found", where=path, fix="check the path in the recipe")
    return _output_hash(path)


def _output_hash(path: Path) -> str:
    """Identity of an output: its manifest where it has one, else its bytes."""
    if path.is_file():
        sidecar = sidecar_path(path)
        return sha256_file(sidecar if sidecar.is_file() else path)
    if (path / MANIFEST).is_file():
        return sha256_file(path / MANIFEST)
    return sha256_bytes("".join(f"{p.relative_to(path)} {sha256_file(p)}\n" for p in _tree(path)).encode())


def _tree(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _intact(path: Path, expected: str) -> bool:
    if not path.exists() or _output_hash(path) != expected:
        return False
    if path.is_file():
        return not verify_files(path.parent, _sidecar_files(path))
    return not (path / MANIFEST).is_file() or not verify_manifest(path)


def _sidecar_files(path: Path) -> dict[str, dict[str, Any]]:
    """The files that the manifest beside a GGUF names; none for other files."""
    sidecar = sidecar_path(path)
    return read_json(sidecar)["files"] if sidecar.is_file() else {}


class _State:
    """run.json: {stage: {"key", "output"}}; output is null between start and end of a stage."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stages = _read_state(path) if path.is_file() else {}

    def done(self, stage: Stage, key: str) -> bool:
        entry = self._stages.get(stage.name, {})
        output = entry.get("output")
        return entry.get("key") == key and output is not None and _intact(stage.output, output)

    def owns(self, stage: Stage) -> bool:
        return stage.name in self._stages

    def record(self, stage: Stage, key: str, output_hash: str | None) -> None:
        self._stages[stage.name] = {"key": key, "output": output_hash}
        with atomic_file(self._path, force=True) as temporary:
            temporary.write_text(json.dumps({"stages": self._stages}, indent=1) + "\n", encoding="utf-8")


def _read_state(path: Path) -> dict[str, dict[str, str | None]]:
    """The stages of run.json. Raises InputError when it is not what `record` writes."""
    content = read_json(path)
    stages = content.get("stages") if isinstance(content, dict) else None
    if not isinstance(stages, dict) or not all(isinstance(entry, dict) for entry in stages.values()):
        raise InputError(
            "run.json is not the record of a run", where=path, fix="delete it and pass --force to run every stage again"
        )
    return stages
