"""`qalora-export merge` through its entry point."""

from __future__ import annotations

from pathlib import Path

import pytest

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.cli.main import main
from tests.qalora.adapters import foreign_adapter, own_adapter


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def test_merges_and_says_what_changed(tiny_canonical: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own_adapter(tiny_canonical, tmp_path / "adapter")
    assert run("merge", tiny_canonical, tmp_path / "adapter", "--out", tmp_path / "merged") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "4 of 14 modules" in said
    assert "logits │ 0 of" in said
    assert "qalora-export export gguf" in said
    assert len(CanonicalCheckpoint(tmp_path / "merged").modules) == 14


def test_conventions_reach_the_merge(tiny_canonical: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = foreign_adapter(tmp_path / "theirs")
    assert run("merge", tiny_canonical, folder, "--out", tmp_path / "out") == 2
    assert "--convention" in capsys.readouterr().err
    assert (
        run("merge", tiny_canonical, folder, "--out", tmp_path / "out", "--convention", "mean", "--no-compare-logits")
        == 0
    )
    assert run("merge", tiny_canonical, folder, "--out", tmp_path / "out", "--convention", "median") == 2


def test_exit_codes_and_messages(tiny_canonical: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own_adapter(tiny_canonical, tmp_path / "adapter")
    assert run("merge", tmp_path / "none", tmp_path / "adapter", "--out", tmp_path / "out") == 2
    assert "model folder not found" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    assert run("merge", tiny_canonical, tmp_path / "adapter", "--out", tmp_path / "out") == 2
    assert "--force" in capsys.readouterr().err
    assert (
        run("merge", tiny_canonical, tmp_path / "adapter", "--out", tmp_path / "out", "--force", "--no-compare-logits")
        == 0
    )
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
    (tmp_path / "adapter" / "manifest.json").unlink()
    assert run("merge", tiny_canonical, tmp_path / "adapter", "--out", tmp_path / "out", "--force") == 4


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("merge", "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Examples" in shown
    assert "--convention mean" in shown
