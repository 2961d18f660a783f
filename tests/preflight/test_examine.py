"""What would stop a late stage stops the run before its first one; sizes are foreseen; a dry run writes nothing."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.cells import cell_len

from qalora_export.cli.main import main
from qalora_export.console import results
from qalora_export.errors import InputError, QaloraError, RuntimeUnavailableError
from qalora_export.pipeline import check, run
from qalora_export.recipe import Recipe
from qalora_export.recipe_file import dump_toml, validated
from qalora_export.verify.check import untried_version
from tests.data.files import write
from tests.models import TEXT

ROW = {"prompt": "turn on 1", "completion": "on 1"}
LONG = {"prompt": "turn on the light " * 100, "completion": "on"}
Raw = dict[str, dict[str, Any]]


@pytest.fixture
def raw(tiny_model: Path, tmp_path: Path) -> Raw:
    """A recipe of every stage over a copy of the model, all of whose inputs are right."""
    shutil.copytree(tiny_model, tmp_path / "model")
    data = str(write(tmp_path / "data.jsonl", *[ROW] * 6))
    (tmp_path / "text.txt").write_text(TEXT)
    return {
        "quantize": {"calibration": str(tmp_path / "text.txt"), "calibration_samples": 4, "sequence_length": 64},
        "train": {"data": data, "validation": data, "rank": 2, "max_steps": 2, "batch_size": 2, "sequence_length": 64},
        "evaluate": {"data": data, "max_new_tokens": 4},
        "export": {},
        "verify": {"prompts": data},
    }


def recipe_of(raw: Raw, folder: Path) -> Recipe:
    return validated(Recipe, raw | {"model": str(folder / "model"), "out": str(folder / "out")}, where="test")


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Callable[[Raw, Path], object]:
    def changed(_: Raw, folder: Path) -> None:
        path = folder / "model/tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content), encoding="utf-8")

    return changed


def without_template(_: Raw, folder: Path) -> None:
    (folder / "model/chat_template.jinja").unlink(missing_ok=True)
    path = folder / "model/tokenizer_config.json"
    content = json.loads(path.read_text())
    content.pop("chat_template", None)
    path.write_text(json.dumps(content))


# What would stop a late stage: how to bring it about, and what must be said of it. Cases of one row do not get into
# each other's way, so one run must find them all.
Case = tuple[Callable[[Raw, Path], object], str]
LATE: dict[str, dict[str, Case]] = {
    "each file": {
        "calibration too short": (lambda _, f: (f / "text.txt").write_text("hm"), "only . tokens"),
        "training line": (
            lambda r, f: r["train"].update(data=str(write(f / "t.jsonl", ROW, "{\n"))),
            r"not valid JSON.*line 2",
        ),
        "validation missing": (lambda r, _: r["train"].update(validation="none.jsonl"), r"not found.*none\.jsonl"),
        "optimizer": (lambda r, _: r["train"].update(optimizer="adamw_torsch"), "unknown optimizer"),
        "questions without answers": (
            lambda r, f: r["evaluate"].update(data=str(write(f / "e.jsonl", ROW, {"text": "x"}))),
            r"last turn must be.*line 2",
        ),
        "a tokenizer GGUF cannot hold": (
            tokenizer(lambda t: t["model"].update(fuse_unk=True)),
            "BPE option fuse_unk",
        ),
        "prompts": (
            lambda r, f: r["verify"].update(prompts=str(write(f / "p.jsonl", ROW, {"txt": ""}))),
            r"fits no known format.*p\.jsonl, line 2",
        ),
        "the last output is somebody else's": (
            lambda _, f: ((f / "out/report").mkdir(parents=True), (f / "out/report/thesis.txt").write_text("mine")),
            "this run did not make",
        ),
    },
    "what fits no model": {
        "no calibration text": (lambda r, _: r["quantize"].pop("calibration"), "GPTQ needs calibration"),
        "nothing to learn": (
            lambda r, f: r["train"].update(validation=str(write(f / "v.jsonl", {"prompt": "x"}))),
            r"no assistant message.*line 1",
        ),
        "targets": (lambda r, _: r["train"].update(targets=["*.z_proj"]), "matches the target"),
        "question beyond the context": (
            lambda r, f: r["evaluate"].update(data=str(write(f / "e.jsonl", LONG))),
            "do not fit in the model's context",
        ),
        "a runtime without its artifact": (
            lambda r, _: (r["export"].update(gguf=None), r["verify"].update(runtimes=["llama.cpp"])),
            "exports no gguf",
        ),
    },
    "settings": {
        "all too long": (
            lambda r, f: r["train"].update(validation=str(write(f / "l.jsonl", LONG))),
            "1 of 1 samples are longer than sequence_length",
        ),
        "pool": (lambda r, _: r["train"].update(pool=48), "pool length 48"),
        "8 bits in GGUF": (lambda r, _: r["quantize"].update(bits=8), "no exact GGUF type"),
    },
    "strict": {
        "one too long": (
            lambda r, f: r["train"].update(data=str(write(f / "l.jsonl", ROW, LONG)), too_long="error"),
            "1 of 2 samples are longer",
        ),
    },
    "nothing to train": {
        "8 bits, symmetric": (
            lambda r, _: r["quantize"].update(bits=8, sym=True),
            "every module that the targets match is left alone",
        ),
    },
    "rule": {
        "a rule that matches nothing": (
            lambda r, _: r["quantize"].update(rules=[{"match": "*.x", "skip": True}]),
            "matches no linear layer",
        ),
    },
    "template": {"no chat template": (without_template, "no chat template")},
    "model": {
        "no model": (lambda _, f: shutil.rmtree(f / "model"), "model folder not found"),
        "data without it": (lambda r, f: write(f / "data.jsonl", ROW, "{\n"), r"not valid JSON.*line 2"),
    },
}


@pytest.mark.parametrize("row", LATE)
def test_what_would_fail_late_fails_before_the_first_stage(raw: Raw, tmp_path: Path, row: str) -> None:
    """All of it at once."""
    for change, _ in LATE[row].values():
        change(raw, tmp_path)
    with pytest.raises(QaloraError) as caught:
        run(recipe_of(raw, tmp_path))
    found = [str(error) for error in caught.value.several or (caught.value,)]
    missed = [name for name, (_, text) in LATE[row].items() if not any(re.search(text, line) for line in found)]
    assert not missed, found
    assert caught.value.code == 2
    assert not (tmp_path / "out/base.qalora").exists()


def test_a_missing_runtime_is_exit_code_3_before_the_first_stage(
    raw: Raw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qalora_export.verify.check.import_problem", lambda name: "No module named 'xllamacpp'")
    with pytest.raises(RuntimeUnavailableError, match=r"llama\.cpp cannot be used here.*No module named") as caught:
        run(recipe_of(raw, tmp_path))
    assert caught.value.code == 3
    assert not (tmp_path / "out/base.qalora").exists()


def test_a_disk_that_is_too_small_is_known_before_the_first_stage(
    raw: Raw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(InputError, match=r"needs about .* of disk, 1.0 MiB are free"):
        run(recipe_of(raw, tmp_path))
    assert not (tmp_path / "out/base.qalora").exists()


def test_a_dry_run_tells_the_plan_and_writes_nothing(raw: Raw, tmp_path: Path) -> None:
    raw["train"]["data"] = str(write(tmp_path / "l.jsonl", ROW, LONG))
    raw["quantize"]["group_size"] = 128
    planned = check(recipe_of(raw, tmp_path))
    assert not (tmp_path / "out").exists()
    assert [stage.name for stage in planned.stages] == list(planned.preflight.stages)
    assert planned.preflight.needed > sum(stage.disk for stage in planned.preflight.stages.values()) > 0
    assert all(stage.seconds >= 0 for stage in planned.preflight.stages.values())
    assert any("1 dropped as too long (line 2)" in note for note in planned.preflight.notes)


def test_every_bad_line_of_a_file_is_named(raw: Raw, tmp_path: Path) -> None:
    """Those that do not parse, that fit no format, that have no answer; what concerns one line stays as it is."""
    raw["train"]["data"] = str(write(tmp_path / "t.jsonl", ROW, "{\n", ROW, {"x": 1}, {"prompt": "only asked"}))
    with pytest.raises(InputError, match="3 lines cannot be used") as caught:
        run(recipe_of(raw, tmp_path))
    for text in ("line 2: not valid JSON", "line 4: the line fits no known format", "line 5: the conversation has no"):
        assert text in str(caught.value)


def test_what_stands_beside_an_output_counts_too(raw: Raw, tmp_path: Path) -> None:
    (tmp_path / "out/adapter.training").mkdir(parents=True)
    (tmp_path / "out/adapter.training/notes.txt").write_text("mine")
    (tmp_path / "out/model.gguf.manifest.json").write_text("{}")
    with pytest.raises(InputError) as caught:
        run(recipe_of(raw, tmp_path))
    found = "\n".join(str(error) for error in caught.value.several)
    assert "not a training record is in the way" in found
    assert re.search(r"did not make.*model\.gguf\.manifest\.json", found)


@pytest.mark.parametrize(("total", "free"), [(2**20, 2**20), (2**40, 2**20)])
def test_memory_is_held_against_what_there_is(
    raw: Raw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total: int, free: int
) -> None:
    """More than the machine has stops the run; more than is free now is said."""
    monkeypatch.setattr("qalora_export.preflight.machine.total_bytes", lambda: total)
    monkeypatch.setattr("qalora_export.preflight.machine.available_bytes", lambda: free)
    if free < total:
        notes = check(recipe_of(raw, tmp_path)).preflight.notes
        assert any(re.search(r"train needs about .* MiB of memory, 1.0 MiB are free now", note) for note in notes)
        return
    with pytest.raises(InputError, match=r"train needs about .* MiB of memory, this machine has 1\.0 MiB"):
        run(recipe_of(raw, tmp_path))


def test_the_plan_says_what_is_not_quantized_and_where_it_runs(raw: Raw, tmp_path: Path) -> None:
    raw["quantize"]["rules"] = [{"match": "*.down_proj", "skip": True}]
    raw["quantize"]["group_size"] = 64
    notes = check(recipe_of(raw, tmp_path)).preflight.notes
    assert any(note.startswith("not quantized: lm_head, embed_tokens, 2 × down_proj (") for note in notes), notes
    assert any(note.startswith("quantization and training run on ") for note in notes)


def test_a_runtime_of_another_version_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr("importlib.metadata.requires", lambda _: ["numpy>=2", 'onnxruntime>=1.31; extra == "runtimes"'])
    for installed, expected in (("1.20.1", "onnxruntime 1.20.1 is installed"), ("1.31.0", None), ("1.32.0.dev1", None)):
        monkeypatch.setattr(
            "importlib.metadata.version", lambda name, v=installed: v if name == "onnxruntime" else version(name)
        )
        note = untried_version("onnxruntime")
        assert note is None if expected is None else note is not None and expected in note


@pytest.mark.parametrize("broken", [False, True])
def test_the_command_line_prints_the_plan_or_every_finding(
    raw: Raw, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    monkeypatch.setattr(results, "width", 80)
    if broken:
        raw["train"]["data"], raw["evaluate"]["data"] = "none.jsonl", "nothing.jsonl"
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(dump_toml(recipe_of(raw, tmp_path)))
    with pytest.raises(SystemExit) as ended:
        main(["run", str(recipe), "--dry-run"])
    out, err = capfd.readouterr()
    assert not (tmp_path / "out").exists()
    assert ended.value.code == (2 if broken else 0)
    if broken:
        assert err.count("error:") == 2 and "2 findings" in err and "none.jsonl" in err and "nothing.jsonl" in err
        return
    table = [line for line in out.splitlines() if line.startswith(("│", "┃"))]
    assert len(table) >= 8 and all(cell_len(line) <= 80 for line in table)
    assert re.search(r"about \d+ (s|min) in all \(rough\); up to [\d.]+ MiB of disk", out)
