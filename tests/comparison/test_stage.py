"""The comparison on a tiny model: every method runs, a killed comparison goes on, divergence is a row's own affair."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qalora_export import stage_keys
from qalora_export.comparison import methods, speed, stage
from qalora_export.comparison.bench import Bench, plain
from qalora_export.comparison.stage import compare
from qalora_export.errors import DivergedError, ExitCode, InputError, QaloraError
from qalora_export.recipe import CompareSettings, EvaluateSettings, QuantizeSettings, Recipe, TrainSettings
from tests.warm_runners import WarmRunners

PAIRS = [("one", "1"), ("two", "2"), ("three", "3"), ("four", "4"), ("five", "5"), ("six", "6")]


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Recipe:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in PAIRS))
    return Recipe(
        model=str(tiny_model),
        out=str(tmp_path / "out"),
        quantize=QuantizeSettings(calibration=str(data), calibration_samples=2, sequence_length=16),
        train=TrainSettings(data=str(data), validation=str(data), rank=4, max_steps=2, batch_size=4),
        evaluate=EvaluateSettings(data=str(data), max_new_tokens=2),
        compare=CompareSettings(bits=(3,), seeds=(0,), learning_rates=(1e-3,), prove=False, speed=False),
    )


def test_every_method_has_its_row_and_a_second_run_keeps_them(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [name for name, method in methods.METHODS.items() if method.bits != "each" or 3 in method.widths]
    report = compare(recipe)
    assert [row.method for row in report.rows] == expected and len(expected) == len(methods.METHODS) - 1
    assert (report.made, report.kept) == (len(expected), 0)
    bits = {row.method: row.bits_per_weight for row in report.rows}
    assert bits["base"] == bits["lora"] == 16
    assert bits["rtn"] == bits["gptq"] == bits["qa-lora"] == bits["qa-lora+"] == bits["qlora+gptq"]
    assert bits["qa-lora-plain"] == bits["qa-lora-refit"] == bits["qa-lora"] >= bits["qa-lora-mixed"] > 3
    assert bits["lq-lora"] >= bits["lq-lora-mixed"] > 3
    assert bits["k-quants"] == bits["qlora+k-quants"] > 3
    assert bits["lq-lora"] == bits["lq-lora-fisher"] > bits["gptq"] and bits["qlora"] > 4.127
    trainable = {row.method: row.trainable for row in report.rows}
    assert trainable["qa-lora+"] == trainable["qa-lora"] < trainable["lora"] == trainable["qlora"]
    for name in ("comparison.json", "comparison.md", "comparison.png"):
        assert (Path(recipe.out) / name).exists()
    assert not (Path(recipe.out) / "work").exists()

    again = compare(recipe)
    assert (again.made, again.kept) == (0, len(expected))
    assert again.rows == report.rows
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_steps": 1})})
    only = other.model_copy(update={"compare": other.compare.model_copy(update={"methods": ("rtn",)})})
    assert compare(only).made == 1  # of other settings, so nothing that was kept counts
    assert compare(only).made == 0
    monkeypatch.setattr(stage_keys, "package_version", lambda name: f"another {name}")
    assert compare(only).made == 1


def test_a_folder_of_the_users_keeps_its_files(recipe: Recipe) -> None:
    out = Path(recipe.out)
    asked = recipe.model_copy(update={"compare": recipe.compare.model_copy(update={"methods": ("rtn",)})})
    (out / "work").mkdir(parents=True)
    (out / "work" / "thesis.tex").write_text("mine")
    (out / "comparison.md").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        compare(asked)
    assert (out / "comparison.md").read_text() == "mine"
    (out / "comparison.md").unlink()
    compare(asked)
    compare(asked)  # over its own table
    assert [path.name for path in (out / "work").iterdir()] == ["thesis.tex"]


def test_what_a_killed_comparison_left_is_no_base_of_other_settings(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe.model_copy(update={"compare": recipe.compare.model_copy(update={"methods": ("rtn",)})})
    with monkeypatch.context() as killed:
        killed.setattr(stage.shutil, "rmtree", lambda *_, **__: None)
        (before,) = compare(asked).rows
    wider = asked.model_copy(update={"quantize": asked.quantize.model_copy(update={"group_size": 64})})
    (after,) = compare(wider).rows
    assert (before.bits_per_weight, after.bits_per_weight) == (4.0, 3.5)


def test_a_rate_that_diverges_is_not_chosen(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe.compare.model_copy(update={"methods": ("qa-lora",), "learning_rates": (1e-3, 1.0)})
    make = methods.METHODS["qa-lora"].make

    def diverging(bench: object, cell: methods.Cell, folder: Path) -> methods.Made:
        if cell.rate == 1.0:
            raise DivergedError("the loss is not finite (nan) at step 1 of 2")
        return make(bench, cell, folder)  # type: ignore[arg-type]

    changed = replace(methods.METHODS["qa-lora"], make=diverging)
    monkeypatch.setitem(methods.METHODS, "qa-lora", changed)
    (row,) = compare(recipe.model_copy(update={"compare": asked})).rows
    assert row.rate == 1e-3 and row.mean_loss is not None


def test_a_variant_takes_the_rate_of_the_row_it_varies(recipe: Recipe) -> None:
    asked = recipe.compare.model_copy(
        update={"methods": ("qa-lora", "qa-lora-mixed", "qa-lora-plain"), "learning_rates": (1e-4, 1e-3, 1e-2)}
    )
    report = compare(recipe.model_copy(update={"compare": asked}))
    assert len({row.rate for row in report.rows}) == 1
    assert 2 <= report.made - 2 <= 3  # one cell each of the variants, the climb of the row they vary
    alone = recipe.model_copy(update={"compare": asked.model_copy(update={"methods": ("qa-lora-plain",)})})
    assert compare(alone).made >= 1  # looks for itself


def test_held_out_text_is_what_rows_are_judged_by(recipe: Recipe, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "one two three four five"}\n{"text": "six one two"}\n')
    asked = recipe.compare.model_copy(update={"methods": ("base", "rtn", "qa-lora"), "text": str(text)})
    report = compare(recipe.model_copy(update={"compare": asked}))
    bench = Bench(recipe.model_copy(update={"compare": asked}), Path(recipe.model), tmp_path / "bench")
    model = plain(bench.source)
    total = count = 0.0
    for (sample,) in bench.rows(str(text)):  # the slow way: one row at a time, its learned tokens one by one
        logits = model(torch.tensor([list(sample.ids)])).logits[0].log_softmax(-1)
        for place, label in enumerate(sample.labels):
            if place and label >= 0:
                total, count = total - float(logits[place - 1, label]), count + 1
    base = report.rows[0]
    assert base.text == (pytest.approx(total / count, rel=1e-5),) and base.judged == base.text != base.loss
    text.write_text('{"text": "another text"}\n')
    assert compare(recipe.model_copy(update={"compare": asked})).made == 3


def test_what_is_missing_is_said_before_anything_is_made(recipe: Recipe) -> None:
    asked = recipe.compare.model_copy(update={"methods": ("qa-lorra",)})
    with pytest.raises(InputError, match="qa-lorra") as caught:
        compare(recipe.model_copy(update={"compare": asked}))
    assert "did you mean 'qa-lora'" in str(caught.value)
    asked = recipe.compare.model_copy(update={"methods": ("qa-lora-mixed",), "bits": (2,)})
    with pytest.raises(InputError, match=r"'qa-lora-mixed' has no row at these bits") as caught:
        compare(recipe.model_copy(update={"compare": asked}))
    assert "4 and 3 bits" in str(caught.value)
    with pytest.raises(InputError, match="nothing to compare the methods on"):
        compare(recipe.model_copy(update={"evaluate": None}))
    gone = recipe.compare.model_copy(update={"text": "gone.jsonl"})
    with pytest.raises(InputError, match=r"\[compare\] text"):
        compare(recipe.model_copy(update={"compare": gone}))
    train = recipe.train.model_copy(update={"validation": None})
    with pytest.raises(InputError, match="learning rates"):
        compare(recipe.model_copy(update={"train": train}))


def test_what_the_methods_need_is_looked_for_first_and_all_at_once(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("peft", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(QaloraError) as caught:
        compare(recipe)
    assert caught.value.code is ExitCode.RUNTIME_UNAVAILABLE and len(caught.value.several) == 2
    assert "qlora+gptq" in str(caught.value) and "'qalora-export[compare]'" in str(caught.value)

    bare = recipe.model_copy(update={"quantize": recipe.quantize.model_copy(update={"calibration": None})})
    with pytest.raises(InputError, match="calibration") as several:
        compare(bare.model_copy(update={"compare": bare.compare.model_copy(update={"methods": ("gptq",)})}))
    assert several.value.code is ExitCode.BAD_INPUT
    assert not (Path(recipe.out) / "cells").exists()

    asked = bare.compare.model_copy(update={"methods": ("rtn",), "prove": True, "speed": True})
    monkeypatch.setattr("qalora_runtimes.launch._version", lambda _: None)
    with pytest.raises(QaloraError) as caught:
        compare(bare.model_copy(update={"compare": asked}))
    assert caught.value.code is ExitCode.RUNTIME_UNAVAILABLE and "[compare] speed" in str(caught.value)


def test_what_is_deployed_is_asked_the_task_in_llama_cpp_too(recipe: Recipe, warm_runners: WarmRunners) -> None:
    data = Path(recipe.quantize.calibration or "")
    data.write_text("".join(json.dumps({"prompt": a, "completion": ".*"}) + "\n" for a, _ in PAIRS))
    asked = recipe.compare.model_copy(update={"methods": ("k-quants",), "prove": True})
    assert recipe.evaluate is not None
    anything = recipe.evaluate.model_copy(update={"match": "regex"})
    proven = recipe.model_copy(update={"compare": asked, "evaluate": anything})
    (row,) = compare(proven).rows
    assert (row.score, row.runtime_score, row.gates) == ((1.0,), 1.0, None)
    (exact,) = compare(recipe.model_copy(update={"compare": asked})).rows
    assert (exact.score, exact.runtime_score) == ((0.0,), 0.0)


def test_a_layout_is_timed_once_beside_the_16_bit_base(
    recipe: Recipe, warm_runners: WarmRunners, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "TURNS", 1)
    asked = recipe.compare.model_copy(update={"methods": ("base", "rtn", "gptq", "k-quants"), "speed": True})
    began: list[Path] = []
    once = speed.Speeds._once

    def counted(self: speed.Speeds, file: Path, folder: Path) -> float:
        began.append(file)
        return once(self, file, folder)

    monkeypatch.setattr(speed.Speeds, "_once", counted)
    timed = recipe.model_copy(update={"compare": asked})
    rows = {row.method: row.speed for row in compare(timed).rows}
    assert len(began) == 6  # three files, each beside the base
    found = {method: row.bits_per_weight for method, row in rows.items() if row is not None}
    assert found["base"] == 16 and found["rtn"] == found["gptq"] == 5 and 4 < found["k-quants"] < 8
    assert all(row is not None and row.tokens_per_second > 0 for row in rows.values())
    assert {row.method: row.speed for row in compare(timed).rows} == rows and len(began) == 6
