"""What the system refuses (no place, no permission, no memory, no runtime): one clear message and its exit code."""

from __future__ import annotations

import errno
import json
import os
import resource

import pytest
import torch

from qalora_export.errors import from_system
from tests.survival import limited
from tests.survival.driven import Driver
from tests.survival.place import (
    BAD,
    GGUF,
    MERGE,
    ONNX,
    QUANTIZE,
    RUN,
    RUNTIME,
    TRAIN,
    VERIFY,
    WRITERS,
    Place,
    check_message,
    partials,
    run,
)


@pytest.mark.parametrize("command", WRITERS, ids=lambda command: command[0] + command[1][:5])
def test_a_folder_that_cannot_be_written(
    command: tuple[str, ...], place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """Below a regular file nothing can be made, not even by root, whom permissions let pass."""
    words = [word.replace("new", "text.txt/new") if word == "new" else word for word in command]
    assert run(*words) == BAD
    check_message(capsys.readouterr().err, ("could not write", "text.txt", "permissions"))
    assert (place / "text.txt").is_file()


def test_run_into_a_folder_that_cannot_be_written(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*RUN, "--out", "text.txt/new") == BAD
    check_message(capsys.readouterr().err, ("could not write", "text.txt"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("command", [QUANTIZE, MERGE, GGUF, ONNX], ids=lambda command: command[0] + command[1][:5])
def test_a_full_disk(
    command: tuple[str, ...],
    number: int,
    place: Place,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Syncing is where a full disk shows at the latest."""

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        code = run(*command)
    assert code == BAD
    check_message(capsys.readouterr().err, (os.strerror(number), "new", "free disk space"))
    assert not (place / "new").exists()
    assert partials(place.path) == []


@pytest.mark.parametrize(
    "command", [QUANTIZE, GGUF, ONNX, TRAIN, MERGE], ids=lambda command: command[0] + command[1][:5]
)
def test_a_file_that_may_not_grow(command: tuple[str, ...], driver: Driver, place: Place) -> None:
    """The real thing: the system refuses bytes beyond 64 kB a file in the middle of writing."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    extra = ("--max-steps", "1", "--rank", "128") if command is TRAIN else ()
    attempt = driver.start(*command, *extra, folder=str(place.path), prepare=[limited.__name__, str(64 << 10)])
    assert driver.ended() == BAD, attempt.said()
    check_message(attempt.said(), ("could not write", "free disk space"))
    assert not (place / "new").exists()
    assert partials(place.path) == []


def verify_with(driver: Driver, place: Place, runtime: str) -> str:
    """What verify-parity says that ends with exit code 3, its runner's process importing from the place first."""
    command = (*VERIFY, "--onnx", "onnx", "--runtime", runtime, "--threads", "1")
    attempt = driver.start(*command, folder=str(place.path), environment={"PYTHONPATH": str(place.path)})
    assert driver.ended() == RUNTIME, attempt.said()
    assert "Traceback" not in attempt.said()
    return " ".join(attempt.said().split())


@pytest.mark.parametrize(
    ("module", "package"), [("onnxruntime", "onnxruntime"), ("onnxruntime_genai", "onnxruntime-genai")]
)
def test_an_absent_runtime_is_exit_3_with_its_package(module: str, package: str, driver: Driver, place: Place) -> None:
    """Not installed, as the runner's process sees it: a module of that name that cannot be imported."""
    place.write(f"{module}.py", "raise ModuleNotFoundError(f'No module named {__name__!r}', name=__name__)\n")
    assert f"pip install {package}" in verify_with(driver, place, package)
    report = json.loads((place / "new/report.json").read_text())
    assert {entry["status"] for entry in report["gates"] if entry["gate"] == "G3"} == {"not run"}


def test_a_crashing_runtime_is_exit_3_with_signal_and_remedy(driver: Driver, place: Place) -> None:
    """A stand-in for the package that dies in the runner's process and is the real one everywhere else."""
    place.write(
        "sitecustomize.py",
        "import os, signal, sys\nif 'qalora_runtimes.onnxruntime_' in sys.orig_argv:\n"
        "    os.kill(os.getpid(), signal.SIGSEGV)\n",
    )
    said = verify_with(driver, place, "onnxruntime")
    assert "SIGSEGV" in said and "a kernel read outside its memory" in said


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (MemoryError("Unable to allocate 3 TiB"), BAD, ("out of memory", "3 TiB")),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), BAD, ("Permission denied", "/data/x")),
    ],
)
def test_what_the_system_refuses_is_said_clearly(
    error: Exception,
    code: int,
    words: tuple[str, ...],
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("qalora_export.qalora.merge.merge", fail)
    assert run(*MERGE) == code
    check_message(capsys.readouterr().err, words)


@pytest.mark.parametrize("out", ["", ".", "/", "..", "base.qalora/new"])
@pytest.mark.parametrize("command", WRITERS, ids=lambda command: command[0] + command[1][:5])
def test_an_output_that_can_be_none_is_refused_by_every_writer(
    command: tuple[str, ...], out: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """A path without a name, the folders around, and the inside of an artifact."""
    assert run(*(out if word == "new" else word for word in command), "--force") == BAD
    check_message(capsys.readouterr().err, ("the output",))
    assert not (place / "base.qalora/new").exists()


def test_memory_that_torch_does_not_get_is_told_in_one_sentence() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**55, dtype=torch.uint8)
    found = from_system(refused.value)
    assert found is not None and found.what == "out of memory"
    assert from_system(RuntimeError("expected scalar type Half")) is None
