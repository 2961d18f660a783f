"""A runtime is one record: registered once, it is requested, verified and reported like the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from qalora_runtimes.launch import RUNNERS

from qalora_export.recipe import VerifySettings
from qalora_export.verify.runtimes import record
from qalora_export.verify.runtimes.llama_cpp import LlamaCpp
from qalora_export.verify.runtimes.record import all_runtimes, register
from qalora_export.verify.stage import verify_parity
from tests.verify.exports import Exported
from tests.verify.fakes import FakeRuntimes


def test_a_new_runtime_is_verified_like_the_others(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_runtimes()
    monkeypatch.setattr(record, "_REGISTERED", dict(record._REGISTERED))
    monkeypatch.setitem(RUNNERS, "llama.cpp-fork", RUNNERS["llama.cpp"])

    @register
    class Fork(LlamaCpp):
        name = "llama.cpp-fork"

    settings = VerifySettings(runtimes=("llama.cpp-fork",))
    report = verify_parity(
        exported.checkpoint,
        tmp_path / "report",
        settings,
        gguf=exported.gguf,
        launch=FakeRuntimes(exported.checkpoint),
        taps=FakeRuntimes(exported.checkpoint).taps,
    )
    assert report.passed
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    assert {entry["runtime"] for entry in written["gates"]} == {"llama.cpp-fork"}


def test_every_record_has_a_runner_and_every_runner_a_record() -> None:
    assert set(all_runtimes()) == set(RUNNERS)
    assert all(RUNNERS[runtime.taps_of].taps for runtime in all_runtimes().values())


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="two runtimes"):
        register(LlamaCpp)
