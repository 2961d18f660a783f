"""Files under verification: hashed before and after, red and named when they change; an old verdict never stays."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from qalora_runtimes.launch import RunnerResult
from qalora_runtimes.protocol import read_job

from qalora_export.errors import ExitCode, InputError, UnsafeInputError
from qalora_export.safety import hashing, sha256_file
from qalora_export.verify.stage import verify_parity
from tests.verify.exports import Exported, copy_of
from tests.verify.fake_runs import ALL, SETTINGS, statuses, verify
from tests.verify.fakes import FakeRuntimes


def swapped(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def put_back(path: Path) -> None:
    """Another file for a moment, then the same bytes under the same name again."""
    content = path.read_bytes()
    path.unlink()
    path.with_name("other").write_bytes(content)
    path.with_name("other").rename(path)


def put_back_with_its_times(path: Path) -> None:
    """Other bytes in the same file for a moment; size, inode, modification time and bytes are then as they were."""
    content, before = path.read_bytes(), path.stat()
    path.write_bytes(bytes(len(content)))
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def swapped_with_its_times(path: Path) -> None:
    before = path.stat()
    swapped(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: swapped(e.gguf), "model.gguf has other bytes"),
        (lambda e: swapped_with_its_times(e.gguf), "model.gguf has other bytes"),
        (lambda e: put_back(e.gguf), "model.gguf was written again"),
        (lambda e: put_back_with_its_times(e.gguf), "model.gguf was touched"),
        (lambda e: e.gguf.with_name("model.gguf.manifest.json").unlink(), "model.gguf.manifest.json is gone"),
        (lambda e: swapped(e.checkpoint / "config.json"), "config.json has other bytes"),
        (lambda e: (e.checkpoint / "new.safetensors").write_bytes(b"x"), "new.safetensors appeared"),
    ],
)
def test_a_file_that_changes_during_the_run_is_red_and_named(
    change: Callable[[Exported], object], words: str, exported: Exported, tmp_path: Path
) -> None:
    shutil.copytree(exported.checkpoint, tmp_path / "base.qalora")
    copy = replace(copy_of(exported, tmp_path), checkpoint=tmp_path / "base.qalora")
    before = sha256_file(copy.gguf)
    fake = FakeRuntimes(exported.checkpoint)

    def last(runtime: str, *, job: Path, **options: Any) -> RunnerResult:
        result = fake(runtime, job=job, **options)
        if read_job(job).text is not None:
            change(copy)
        return result

    report = verify(copy, tmp_path / "report", last)
    assert report.exit_code == ExitCode.PARITY_FAILED
    assert [gate for gate, status in statuses(report).items() if status == "fail"] == ["G0"]
    assert report.entries[0].where[0].startswith(words)
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    assert written["artifacts"][0]["files"]["model.gguf"] == before  # what was verified, not what lies there now


def test_every_run_checks_that_its_files_stayed_the_same(exported: Exported, tmp_path: Path) -> None:
    report = verify(exported, tmp_path / "report", FakeRuntimes(exported.checkpoint), ALL)
    for entry in report.entries:
        if entry.gate == "G0":
            assert entry.checks[-1].figure == "changed_files"
            assert entry.checks[-1].passed


def test_every_file_is_hashed_before_the_gates_and_after_them_and_no_more(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest, the chain, G0 of each runtime and the report all ask for the same files."""
    digest, times = hashing.sha256_file, Counter[str]()

    def counted(path: Path, **options: Any) -> str:
        times[str(path)] += 1
        return digest(path, **options)

    for module in [module for module in sys.modules.values() if getattr(module, "sha256_file", None) is digest]:
        monkeypatch.setattr(module, "sha256_file", counted)
    verify(exported, tmp_path / "report", FakeRuntimes(exported.checkpoint), ALL)
    weights = [exported.checkpoint / "model.safetensors", exported.gguf, *exported.onnx.rglob("model.onnx[._]data")]
    assert [times[str(path)] for path in weights] == [2, 2, 2]


@pytest.mark.parametrize(
    "how", ["unreadable artifact", "no artifact", "no checkpoint", "crash of our own", "interrupt"]
)
def test_a_run_that_fails_leaves_no_old_verdict(how: str, exported: Exported, tmp_path: Path) -> None:
    out = tmp_path / "report"
    assert verify(exported, out, FakeRuntimes(exported.checkpoint)).passed
    gguf, checkpoint, launch = exported.gguf, exported.checkpoint, FakeRuntimes(exported.checkpoint)
    if how == "unreadable artifact":
        gguf = tmp_path / "cut.gguf"
        gguf.write_bytes(exported.gguf.read_bytes()[:-100])
    elif how == "no artifact":
        gguf = tmp_path / "none.gguf"
    elif how == "no checkpoint":
        checkpoint = tmp_path / "nothing"
    else:

        def launch(*_: object, **__: object) -> RunnerResult:
            raise KeyboardInterrupt if how == "interrupt" else ZeroDivisionError

    with pytest.raises((InputError, UnsafeInputError, ZeroDivisionError, KeyboardInterrupt)):
        verify_parity(checkpoint, out, SETTINGS, gguf=gguf, launch=launch, force=True)
    assert not list(tmp_path.rglob("report.*")) and not list(tmp_path.rglob("junit.xml"))


def test_without_force_an_old_report_stays_whole(exported: Exported, tmp_path: Path) -> None:
    out = tmp_path / "report"
    verify(exported, out, FakeRuntimes(exported.checkpoint))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(InputError, match="exists"):
        verify(exported, out, FakeRuntimes(exported.checkpoint))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
