"""run: stages are skipped when nothing changed, run again when something did, never overwrite a stranger's files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qalora_export.checkpoint.manifest import write_manifest
from qalora_export.errors import ExitCode, InputError, ParityError
from qalora_export.evaluation import evaluate
from qalora_export.pipeline import run
from qalora_export.recipe import Recipe
from qalora_export.recipe_file import dump_toml, load_recipe, validated
from qalora_export.stages import plan


def _samples(path: Path, count: int = 12) -> str:
    rows = [
        {"messages": [{"role": "user", "content": f"turn on {n}"}, {"role": "assistant", "content": f"on {n}"}]}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Recipe:
    """Every stage but verify-parity, small enough to run in seconds."""
    data = _samples(tmp_path / "data.jsonl")
    raw: dict[str, Any] = {
        "model": str(tiny_model),
        "out": str(tmp_path / "out"),
        "quantize": {"method": "rtn"},
        "train": {"data": data, "rank": 2, "max_steps": 2, "batch_size": 2, "sequence_length": 64},
        "evaluate": {"data": data, "limit": 2, "max_new_tokens": 4},
    }
    return validated(Recipe, raw, where="test")


@pytest.fixture
def no_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verify stage has tests of its own; here its report is one empty file."""

    def fake(merged: Path, report: Path, *_: object, **__: object) -> SimpleNamespace:
        report.mkdir(exist_ok=True)
        (report / "report.json").write_text('{"verdict": "pass", "gates": []}')
        write_manifest(report, "report", tensors={}, parents=[], settings={})
        return SimpleNamespace(exit_code=ExitCode.OK, out=report)

    monkeypatch.setattr("qalora_export.verify.stage.verify_parity", fake)


STAGES = (
    "quantize",
    "train",
    "merge",
    "evaluate base",
    "evaluate merged",
    "export gguf",
    "export onnx",
    "verify-parity",
)


def test_all_stages_then_nothing_then_what_changed(recipe: Recipe, no_parity: None, tmp_path: Path) -> None:
    assert run(recipe).ran == STAGES
    assert run(recipe).skipped == STAGES
    out = Path(recipe.out)
    assert load_recipe(out / "recipe.resolved.toml") == recipe
    assert (out / "recipe.resolved.toml").read_text().startswith(dump_toml(recipe))
    card = (out / "README.md").read_text()
    assert all(
        word in card for word in ("RTN to 4 bits", "llama-cli -m model.gguf", "/2 |", "merged.qalora/manifest.json")
    )

    # Other training settings: quantize and the base's score stand, everything after training runs again.
    changed = recipe.model_copy(update={"train": recipe.train.model_copy(update={"rank": 3})})
    assert run(changed).skipped == ("quantize", "evaluate base")

    # A damaged output is made again; what follows from it is unchanged because it comes out equal.
    with (out / "base.qalora" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    assert run(changed).ran == ("quantize",)


def test_a_changed_input_file_runs_its_stages_again(recipe: Recipe, no_parity: None, tmp_path: Path) -> None:
    run(recipe)
    _samples(tmp_path / "data.jsonl", count=14)
    assert run(recipe).skipped == ("quantize",)


def test_foreign_output_is_refused(recipe: Recipe, no_parity: None) -> None:
    stranger = Path(recipe.out) / "adapter"
    stranger.mkdir(parents=True)
    (stranger / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="this run did not make"):
        run(recipe)
    assert (stranger / "thesis.txt").read_text() == "mine"


def test_missing_input_is_named(recipe: Recipe, no_parity: None, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").unlink()
    with pytest.raises(InputError, match=r"data\.jsonl"):
        run(recipe)


def test_an_interrupted_stage_is_run_again(recipe: Recipe, no_parity: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("qalora_export.qalora.merge.merge", interrupted)
        run(recipe)
    report = run(recipe)
    assert report.skipped == ("quantize", "train")
    assert report.ran[0] == "merge"


def test_a_failed_parity_is_shown_raised_and_never_recorded_as_done(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(merged: Path, report: Path, *_: object, **__: object) -> SimpleNamespace:
        report.mkdir(exist_ok=True)
        return SimpleNamespace(exit_code=ExitCode.PARITY_FAILED, out=report)

    monkeypatch.setattr("qalora_export.verify.stage.verify_parity", fake)
    seen = list[str]()
    for _ in range(2):
        with pytest.raises(ParityError, match="do not hold the numbers"):
            run(recipe, on_stage=lambda name, report: seen.append(name))
    assert seen == [*STAGES, "verify-parity"]


def test_plan_names_every_path(recipe: Recipe) -> None:
    outputs = [stage.output.name for stage in plan(recipe)]
    assert outputs == [
        "base.qalora",
        "adapter",
        "merged.qalora",
        "score.base.json",
        "score.merged.json",
        "model.gguf",
        "onnx",
        "report",
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "line 1"),
        ('{"messages": 3}', "line 1"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "line 1"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "line 1"),
        ("", "empty"),
    ],
)
def test_bad_evaluation_data(tiny_canonical: Path, tmp_path: Path, line: str, expected: str) -> None:
    from qalora_export.recipe import EvaluateSettings

    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        evaluate(tiny_canonical, EvaluateSettings(data=str(path)))
    assert expected in str(caught.value)
