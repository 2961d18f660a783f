"""`qalora-export export gguf` through its real entry point."""

import subprocess
import sys
from pathlib import Path

import pytest

from qalora_export.cli.main import main


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qalora_export.cli", "export", "gguf", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_export_then_refuse_then_force(tiny_canonical: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    done = run(tiny_canonical, "--out", out)
    assert done.returncode == 0, done.stderr
    assert out.exists()
    assert "next:" in done.stderr
    assert "verify-parity" in done.stderr
    again = run(tiny_canonical, "--out", out, "--layout", "split")
    assert again.returncode == 2
    assert "exists" in again.stderr
    assert "--force" in again.stderr
    forced = run(tiny_canonical, "--out", out, "--layout", "split", "--force")
    assert forced.returncode == 0, forced.stderr
    assert (tmp_path / "m.lora.gguf").exists()
    assert "m.lora.gguf" in forced.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("missing", "--out", "m.gguf"), "not found"),
        (("{model}", "--out", "m.gguf"), "not a canonical checkpoint"),
        (("{model}", "--out", "m.gguf", "--layout", "q5"), "q5"),
    ],
)
def test_bad_usage_is_exit_code_2(
    tiny_model: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["export", "gguf", *(text.replace("{model}", str(tiny_model)) for text in arguments)])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_is_fast_and_shows_examples() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "--layout split" in done.stdout
    probe = "import sys; import qalora_export.cli.export_gguf; print('torch' in sys.modules, 'gguf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout.split() == ["False"] * 2
