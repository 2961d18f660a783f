"""`~/x` is a file at home, in every path of every verb and of a recipe; a shell leaves it alone in --out=~/x."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qalora_export.cli.main import main
from qalora_export.recipe_file import PATH_KEYS, load_recipe

# verb -> its words with X where a path is asked for; each X in turn is ~/none, the others are there.
VERBS = (
    "inspect X",
    "inspect {base} X",
    "quantize X --out {new} --method rtn",
    "quantize {model} --out {new} --calibration X",
    "train X --data {data} --out {new}",
    "train {base} --data X --out {new}",
    "train {base} --data {data} --validation X --out {new}",
    "merge X {base} --out {new}",
    "merge {base} X --out {new}",
    "evaluate X --data {data}",
    "evaluate {base} --data X",
    "export gguf X --out {new}",
    "export gguf {base} --adapter X --out {new}",
    "export onnx X --out {new}",
    "verify-parity X --gguf {data} --out {new}",
    "verify-parity {base} --gguf X --out {new}",
    "verify-parity {base} --onnx X --out {new}",
    "run X",
    "compare X",
)


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    return int(caught.value.code or 0)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.mark.parametrize("words", VERBS)
def test_an_input_at_home_is_looked_for_there(
    words: str,
    home: Path,
    tiny_model: Path,
    tiny_canonical: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "on and off"}\n')
    places = {"base": tiny_canonical, "model": tiny_model, "data": tmp_path / "data.jsonl", "new": tmp_path / "new"}
    command = [word.format(**places).replace("X", "~/none.gguf") if "/" not in word else word for word in words.split()]
    assert run(*command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{home}/none.gguf" in said and "~" not in said, said


def test_an_output_at_home_is_written_there(home: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny_model, home / "model")
    monkeypatch.chdir(home.parent)
    assert run("quantize", "~/model", "--out=~/base.qalora", "--method", "rtn") == 0
    assert run("export", "gguf", "~/base.qalora", "--out", "~/model.gguf") == 0
    assert {path.name for path in home.iterdir()} >= {"base.qalora", "model.gguf"}
    assert not (home.parent / "~").exists()


def test_every_path_of_a_recipe(home: Path, tmp_path: Path) -> None:
    lines = []
    for table, names in PATH_KEYS.items():
        lines += [f"[{table}]"] * bool(table) + [f'{name} = "~/{table}{name}"' for name in names]
    (tmp_path / "recipe.toml").write_text("\n".join(lines) + "\n")
    raw = load_recipe(tmp_path / "recipe.toml").model_dump(mode="json")
    for table, names in PATH_KEYS.items():
        for name in names:
            assert (raw[table] if table else raw)[name] == f"{home}/{table}{name}"
