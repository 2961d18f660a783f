"""`run recipe.toml`: every stage from one file, each skipped when nothing it depends on has changed.

run.json records, per stage, its key (see stage_keys) and the hash of its output. A stage is skipped when its key is
recorded as done and its output is still intact; otherwise it runs again. The key is recorded as started before the
stage writes anything, so a killed run knows which outputs are its own to replace.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_export.checkpoint.output import refuse_foreign, refuse_place, write_signed
from qalora_export.errors import ExitCode, InputError, ParityError, RuntimeUnavailableError
from qalora_export.model_card import write_card
from qalora_export.preflight.examine import Preflight, examine
from qalora_export.preflight.findings import Findings
from qalora_export.recipe import Recipe
from qalora_export.recipe_file import PATH_KEYS, dump_toml, load_recipe, validated
from qalora_export.safety import StrPath, atomic_file, exclusive, local_path, read_json
from qalora_export.stage_keys import intact, output_hash, stage_key
from qalora_export.stages import STAGES, VERIFY, Stage, plan

if TYPE_CHECKING:
    from qalora_export.verify.report.parity_report import ParityReport

STATE = "run.json"
RESOLVED = "recipe.resolved.toml"
FORMAT = "qalora-run/1"
logger = logging.getLogger(__name__)
OnStage = Callable[[str, Any], None]  # name of a stage and the report that it returned
OnPlan = Callable[["RunPlan"], None]


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What `run` will do: every stage, the names of those that are up to date, and what the others take. keys: of
    stages whose inputs are all there, by name.

    A stage after one that runs counts as one that will, although it is skipped when its inputs come out as they were.
    """

    stages: tuple[Stage, ...]
    done: frozenset[str]
    preflight: Preflight
    keys: dict[str, str]


@dataclass(frozen=True, slots=True)
class RunReport:
    """What `run` did: names of stages that ran and that were skipped, and the folder of the artifacts.

    reports: what each stage that ran returned, by its name. seconds: what it took, by its name.
    """

    out: Path
    ran: tuple[str, ...]
    skipped: tuple[str, ...]
    reports: dict[str, Any]
    seconds: dict[str, float]


def run(
    recipe: Recipe | StrPath, *, force: bool = False, on_plan: OnPlan | None = None, on_stage: OnStage | None = None
) -> RunReport:
    """Run every stage of a recipe (an object, or the path of its TOML file), resuming where an earlier run stopped.

    Every input of every stage is checked before the first one starts; on_plan is called with what that found. on_stage
    is called with name and report when a stage has run, also when parity failed.

    Raises InputError when an output exists that no earlier run of this folder made (unless `force`), one error that
    holds all findings when several inputs cannot be used, ParityError when verify-parity fails, and whatever a stage
    raises.
    """
    recipe, out = _opened(recipe)
    with exclusive(out / STATE):
        state = _State(out / STATE)
        planned = _check(recipe, state, force=force)
        if on_plan is not None:
            on_plan(planned)
        return _run(recipe, out, planned, state, force=force, on_stage=on_stage or (lambda *_: None))


def check(recipe: Recipe | StrPath, *, force: bool = False) -> RunPlan:
    """What `run` would do and what it will take, and every check of its inputs; nothing is left behind.

    A hub model that is not in the cache is fetched into it. Raises what `run` raises before its first stage.
    """
    recipe, out = _opened(recipe)
    return _check(recipe, _State(out / STATE), force=force)


def _opened(recipe: Recipe | StrPath) -> tuple[Recipe, Path]:
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(local_path(recipe))
    out = Path(recipe.out)
    if Path(recipe.model).resolve() in (out.resolve(), *out.resolve().parents):
        raise InputError("the output folder lies inside the model", where=out, fix="choose another `out`")
    return recipe, out


def _check(recipe: Recipe, state: _State, *, force: bool) -> RunPlan:
    """Every finding of every stage at once. Raises them."""
    findings, stages = Findings(), list[Stage]()
    with findings.during("quantize"):
        stages = plan(recipe)
    done, pending, unread = set[str](), dict[Path, str](), dict[str, InputError]()
    keys = dict[str, str]()
    for stage in stages:
        waits = bool(pending.keys() & set(stage.inputs))  # for what a stage before it will make
        try:
            key = None if waits else stage_key(stage.name, stage.inputs, stage.settings)
        except InputError as error:
            key, unread[stage.name] = None, error
        if key is not None:
            keys[stage.name] = key
        if key is not None and not force and state.done(stage, key):
            done.add(stage.name)
            continue
        with findings.during(stage.name):
            _check_output(stage, ours=force or state.owns(stage))
        pending[stage.output] = stage.name
    names = tuple(pending.values()) if stages else STAGES
    found = examine(recipe, names, findings)
    for name, problem in unread.items():
        if not findings.of(name):  # the stage's own check says more
            findings.add(name, problem)
    findings.raise_any()
    assert found is not None
    return RunPlan(tuple(stages), frozenset(done), found, keys)


def _check_output(stage: Stage, *, ours: bool) -> None:
    """Raise InputError, as the stage would, when one of its outputs must not be written."""
    for path in (stage.output, *stage.beside):
        refuse_place(path, stage.inputs)
        if path.exists() and not ours:
            raise InputError(
                "an output exists that this run did not make",
                where=path,
                fix="choose another `out`, delete it, or pass --force",
            )
        refuse_foreign(path)
    if stage.name == "train":
        from qalora_export.qalora.training.folder import folder_for, refuse_strangers

        refuse_place(folder_for(stage.output), stage.inputs)
        refuse_strangers(folder_for(stage.output))


def _run(recipe: Recipe, out: Path, planned: RunPlan, state: _State, *, force: bool, on_stage: OnStage) -> RunReport:
    if write_signed(out / RESOLVED, dump_toml(_relative_to(recipe, out)), comment=("# ", "")) is None:
        logger.warning("the resolved recipe was not saved: files of its name are there that are not ours")
    reports, skipped, seconds = dict[str, Any](), list[str](), dict[str, float]()
    for number, stage in enumerate(planned.stages, 1):
        place = f"[{number}/{len(planned.stages)}]"
        key = planned.keys.get(stage.name) or stage_key(stage.name, stage.inputs, stage.settings)
        if stage.name in planned.done or (not force and state.done(stage, key)):
            logger.info("%s %s: up to date, %s", place, stage.name, stage.output)
            skipped.append(stage.name)
            continue
        ours = force or state.owns(stage)
        logger.info("%s %s → %s", place, stage.name, stage.output)
        state.record(stage, key, output=None)
        began = time.monotonic()
        reports[stage.name] = stage.action(ours)
        seconds[stage.name] = time.monotonic() - began
        on_stage(stage.name, reports[stage.name])
        if stage.name == VERIFY:
            _require_pass(reports[stage.name])
        state.record(stage, key, output=output_hash(stage.output))
    if write_card(recipe) is None:
        logger.warning("the model card was not written: README.md and README.qalora.md are there and not ours")
    return RunReport(out, tuple(reports), tuple(skipped), reports, seconds)


def _relative_to(recipe: Recipe, out: Path) -> Recipe:
    """The recipe as it reads from a file in `out`; absolute paths stay."""
    raw = recipe.model_dump(mode="json")
    for table, keys in PATH_KEYS.items():
        target = raw[table] if table else raw
        for key in keys:
            if target and target[key] is not None and not Path(target[key]).is_absolute():
                target[key] = os.path.relpath(Path(target[key]).resolve(), out.resolve())
    return validated(Recipe, raw, where=out / RESOLVED)


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
            "something was not run: this is not a pass",
            where=report.out,
            fix="report.json says what: install that runtime, or name the runtimes you ship in [verify] runtimes",
        )


class _State:
    """run.json: {stage: {"key", "output"}}; output is null between start and end of a stage."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stages = _read_state(path) if path.is_file() else {}

    def done(self, stage: Stage, key: str) -> bool:
        entry = self._stages.get(stage.name, {})
        output = entry.get("output")
        return entry.get("key") == key and output is not None and intact(stage.output, output)

    def owns(self, stage: Stage) -> bool:
        return stage.name in self._stages

    def record(self, stage: Stage, key: str, output: str | None) -> None:
        self._stages[stage.name] = {"key": key, "output": output}
        with atomic_file(self._path, force=True) as temporary:
            content = {"format": FORMAT, "stages": self._stages}
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _read_state(path: Path) -> dict[str, dict[str, str | None]]:
    """The stages of run.json. Raises InputError when it is not what `record` writes."""
    content = read_json(path)
    stages = content.get("stages") if isinstance(content, dict) and content.get("format") == FORMAT else None
    if not isinstance(stages, dict) or not all(isinstance(entry, dict) for entry in stages.values()):
        raise InputError(
            "run.json is not the record of a run",
            where=path,
            fix="choose another `out`; if the outputs here are yours, delete it and pass --force to make them again",
        )
    return stages
