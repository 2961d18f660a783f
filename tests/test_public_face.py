"""`import qalora_export as q`: every name is there, documented, typed, and no call prints a line."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest

import qalora_export as q
from tests.models import TEXT
from tests.verify.exports import Exported
from tests.verify.fakes import FakeRuntimes

pytestmark = pytest.mark.usefixtures("warm_runners")

LINE = ("quantize", "train", "merge", "export_gguf", "export_onnx", "verify_parity", "evaluate", "run")
STAGES = (*LINE, "pack_verification", "diagnose", "export_patch")
REPORTS = [name for name in q.__all__ if name.endswith("Report") or name == "Diagnosis"]
IMPORT_ALL = """
import importlib, pkgutil, types
import qalora_export as q
for module in pkgutil.walk_packages(q.__path__, "qalora_export."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
shadowed = [name for name in q.__all__ if isinstance(getattr(q, name), types.ModuleType)]
assert not shadowed, shadowed
"""


def test_every_name_is_there_listed_and_documented() -> None:
    assert len(set(q.__all__)) == len(q.__all__)
    assert set(q.__all__) <= set(dir(q))
    for name in q.__all__:
        value = getattr(q, name)
        if name != "__version__":
            own = value.__doc__ if inspect.isfunction(value) else value.__dict__.get("__doc__")
            assert own and len(own) > 20, f"{name} has no docstring of its own"
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        q.nothing_of_the_kind  # noqa: B018


def test_the_names_checkers_see_are_the_names_there_are() -> None:
    """__init__ imports lazily at run time and by `if TYPE_CHECKING` for checkers: one list, not two."""
    source = inspect.getsource(q).partition("if TYPE_CHECKING:")[2].partition("\n__all__")[0]
    tree = ast.parse("if True:" + source)
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported = {alias.asname or alias.name for node in nodes for alias in node.names}
    assert imported | {"__version__"} == set(q.__all__)


def test_no_public_name_is_shadowed_when_every_submodule_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", STAGES)
def test_stages_take_paths_as_text_and_return_a_report(name: str) -> None:
    function = getattr(q, name)
    hints = get_type_hints(function, vars(sys.modules[function.__module__]) | {"ParityReport": q.ParityReport})
    assert hints["return"].__name__ in REPORTS
    paths = [p for p in inspect.signature(function).parameters if p not in PLAIN]
    assert paths
    assert all(str in getattr(hints[p], "__args__", ()) for p in paths), paths


PLAIN = {
    "settings",
    "evaluate",
    "force",
    "reverse",
    "revision",
    "resume",
    "convention",
    "compare_logits",
    "bisect",
    "cache",
    "launch",
    "taps",
    "on_plan",
    "on_stage",
}


@pytest.mark.parametrize("name", REPORTS)
def test_reports_cannot_be_changed(name: str) -> None:
    report = getattr(q, name)
    assert dataclasses.is_dataclass(report)
    assert report.__dataclass_params__.frozen  # type: ignore[attr-defined]


@pytest.fixture
def data(tmp_path: Path) -> str:
    turns = [{"role": "user", "content": "on"}, {"role": "assistant", "content": "done"}]
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return str(tmp_path / "data.jsonl")


def test_the_whole_line_by_text_paths_prints_nothing(
    tiny_model: Path, data: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base, adapter, merged = (str(tmp_path / name) for name in ("base.qalora", "adapter", "merged.qalora"))
    quantized = q.quantize(str(tiny_model), base)
    assert (quantized.method, len(quantized.modules)) == ("rtn", 14)
    trained = q.train(base, adapter, q.TrainSettings(data=data, max_steps=1, rank=2))
    assert trained.steps == 1
    assert q.merge(base, adapter, merged).changed_codes == 0
    assert q.export_gguf(merged, str(tmp_path / "model.gguf")).differing == 0
    assert q.export_onnx(merged, str(tmp_path / "onnx")).differing == 0
    assert q.evaluate(merged, q.EvaluateSettings(data=data, max_new_tokens=2)).total == 1
    for path, kind in (
        (merged, "canonical checkpoint"),
        (adapter, "adapter"),
        (str(tmp_path / "model.gguf"), "GGUF"),
        (str(tmp_path / "onnx"), "ONNX folder"),
        (str(tiny_model), "model folder"),
    ):
        assert q.load(path).kind == kind
    assert q.load_model(merged).config.vocab_size == len(q.load_tokenizer(merged))
    assert capfd.readouterr() == ("", "")


def test_gptq_prints_nothing_either(
    tiny_model: Path, data: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = str(tmp_path / "text.txt")
    settings = q.QuantizeSettings(calibration=text, calibration_samples=2, sequence_length=32)
    assert q.quantize(str(tiny_model), str(tmp_path / "base"), settings).method == "gptq"
    assert capfd.readouterr() == ("", "")


def test_verify_parity_prints_nothing_and_asks_every_runtime_that_fits(
    exported: Exported, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fake = FakeRuntimes(exported.checkpoint)
    out = str(tmp_path / "report")
    report = q.verify_parity(str(exported.checkpoint), out, gguf=str(exported.gguf), launch=fake, taps=fake.taps)
    assert report.passed
    assert {entry.runtime for entry in report.entries} == {"llama.cpp"}
    assert capfd.readouterr() == ("", "")


def test_run_takes_the_path_of_a_recipe_prints_nothing_and_logs_its_stages(
    tiny_model: Path,
    data: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def verified(checkpoint: Path, out: Path, *_: Any, **__: Any) -> SimpleNamespace:
        out.mkdir()
        return SimpleNamespace(exit_code=0, out=out)

    monkeypatch.setattr("qalora_export.verify.stage.verify_parity", verified)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'model = "{tiny_model}"\nout = "out"\n[quantize]\nmethod = "rtn"\n'
        '[train]\ndata = "data.jsonl"\nmax_steps = 1\nrank = 2\n[export]\nonnx = {}\n'
    )
    caplog.set_level(logging.INFO, logger="qalora_export")
    report = q.run(str(recipe))
    assert report.ran == ("quantize", "train", "merge", "export gguf", "export onnx", "verify-parity")
    assert isinstance(report.reports["train"], q.TrainReport)
    assert [r.getMessage() for r in caplog.records if r.name == "qalora_export.pipeline"][1].startswith("[2/6] train")
    assert capfd.readouterr() == ("", "")


def test_errors_are_of_this_package(tmp_path: Path) -> None:
    with pytest.raises(q.InputError, match="nothing to inspect"):
        q.load(str(tmp_path / "absent"))
    assert all(issubclass(getattr(q, name), q.QaloraError) for name in q.__all__ if name.endswith("Error"))


def test_every_path_may_be_a_str() -> None:
    functions = [getattr(q, name) for name in q.__all__ if inspect.isfunction(getattr(q, name))]
    assert q.load_recipe in functions
    for function in functions:
        for parameter in inspect.signature(function).parameters.values():
            said = str(parameter.annotation)
            assert "Path" not in said.replace("StrPath", "").replace("PathLike", ""), (
                f"{function.__name__}: {parameter}"
            )
