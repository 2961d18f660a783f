"""doctor names what is missing and how to get it."""

import importlib.metadata

import pytest
from typer.testing import CliRunner

from qalora_export.cli import main
from qalora_export.inspection import doctor


def test_everything_here_is_found() -> None:
    main._register_verbs()
    run = CliRunner().invoke(main.app, ["doctor"])
    assert run.exit_code == 0, run.output
    assert "xllamacpp" in run.output


def test_a_missing_runtime_is_exit_code_3(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def without_llama(name: str) -> str:
        if name == "xllamacpp":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", without_llama)
    missing = [finding for finding in doctor.examine() if finding.status == "missing"]
    assert [finding.subject for finding in missing] == ["runtime llama.cpp"]
    assert "pip install xllamacpp" in missing[0].detail
    main._register_verbs()
    assert CliRunner().invoke(main.app, ["doctor"]).exit_code == 3
