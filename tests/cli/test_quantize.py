"""`qalora-export quantize` through its real entry point."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.cli.main import main
from tests.models import TEXT
from tests.quantization.gptq_packer import make_gptq_folder


def run(*arguments: object) -> int:
    try:
        main(["quantize", *map(str, arguments)])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_gptq_in_a_process_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "qalora_export.cli",
            "quantize",
            str(tiny_model),
            "--out",
            str(tmp_path / "q"),
            "--calibration",
            str(text),
            "--bits",
            "3",
            "--group-size",
            "64",
            "--calibration-samples",
            "4",
            "--sequence-length",
            "64",
            "--rule",
            "*.v_proj=skip",
            "--rule",
            "*.down_proj=bits:4",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "140"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    modules = CanonicalCheckpoint(tmp_path / "q").modules
    assert modules["model.layers.0.mlp.down_proj"] == (4, 64)
    assert modules["model.layers.1.mlp.up_proj"] == (3, 64)
    assert not any(name.endswith("v_proj") for name in modules)
    for expected in (
        "bits per weight",
        "the worst 5 of 12",
        "quantize_report.json",
        "kept bit for bit",
        "peak memory",
        "256 calibration tokens",
        f"next: qalora-export train {tmp_path / 'q'}",
    ):
        assert expected in " ".join(done.stderr.split()), expected


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert "Examples" in shown
    assert "qalora-export quantize my-model --out base.qalora --method rtn" in " ".join(shown.split())


def test_flags_beat_the_recipe(tiny_model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'model = "m"\nout = "o"\n[quantize]\nmethod = "rtn"\nbits = 8\ngroup_size = 64\nsym = true\n'
        '[[quantize.rules]]\nmatch = "*.q_proj"\nskip = true\n'
    )
    assert run(tiny_model, "--out", tmp_path / "q", "--recipe", recipe, "--bits", "2", "--asym") == 0
    written = CanonicalCheckpoint(tmp_path / "q")
    assert written.modules["model.layers.0.mlp.up_proj"] == (2, 64)
    assert "model.layers.0.self_attn.q_proj" not in written.modules
    assert not written.group_affine("model.layers.0.mlp.up_proj").is_symmetric


def test_import_of_a_gptq_checkpoint(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_gptq_folder(tmp_path / "gptq", tiny_model, stored="gptq_v2", config={"checkpoint_format": None})
    assert run(tmp_path / "gptq", "--out", tmp_path / "q") == 2
    assert "--checkpoint-format gptq_v2" in capsys.readouterr().err
    assert run(tmp_path / "gptq", "--out", tmp_path / "q", "--checkpoint-format", "gptq_v2") == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "import-gptq" in shown
    assert "0 weights changed" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "7"], "bits"),
        (["--method", "awq"], "method"),
        (["--group-size", "48"], "group_size"),
        (["--rule", "*.up_proj=bit:3"], "is not an action"),
        (["--rule", "nothing=skip"], "matches no linear layer"),
        ([], "needs calibration text"),
        (["--calibration", "missing.txt"], "calibration file not found"),
    ],
)
def test_bad_usage_is_exit_code_2_and_one_clear_error(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(tiny_model, "--out", tmp_path / "q", *arguments) == 2
    shown = capsys.readouterr().err
    assert message in " ".join(shown.split())
    assert "Traceback" not in shown
    assert not (tmp_path / "q").exists()


def test_an_unsafe_model_is_exit_code_4(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert run(folder, "--out", tmp_path / "q", "--method", "rtn") == 4
    assert not (tmp_path / "q").exists()
