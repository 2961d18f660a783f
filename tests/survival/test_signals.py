"""A signal ends every writing command: nothing unfinished stays, no runner lives on, one line, exit code 128 + n."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import qalora_export
from tests.survival.driven import Driver
from tests.survival.inputs import Inputs
from tests.survival.test_orphans import assert_ends, wait_for

SAID = "interrupted by {}; finished stages are kept, run the same command again to go on"


def words(verb: str, inputs: Inputs, out: Path) -> tuple[object, ...]:
    base, folder, artifacts = inputs.base, inputs.folder, inputs.artifacts
    data, training = folder / "data.jsonl", ("--max-steps", 4, "--evaluate-every", 2, "--rank", 2)
    return {
        "quantize": ("quantize", inputs.model, "--out", out / "b", "--method", "rtn"),
        "quantize a GGUF": ("quantize", artifacts.gguf, "--out", out / "b", "--method", "rtn"),
        "train": ("train", base, "--data", data, "--validation", data, "--out", out / "a", *training),
        "merge": ("merge", base, inputs.adapters[0], "--out", out / "m"),
        "export gguf": ("export", "gguf", base, "--out", out / "model.gguf", "--layout", "split"),
        "export onnx": ("export", "onnx", base, "--out", out / "onnx"),
        "evaluate": ("evaluate", base, "--data", data, "--max-new-tokens", 2, "--out", out / "score.json"),
        "verify-parity": ("verify-parity", artifacts.checkpoint, "--gguf", artifacts.gguf, "--out", out / "report"),
        "run": (
            *("run", folder / "recipe.toml", "--out", out / "run"),
            *("--set", f"model={inputs.model}", "--set", "quantize.method=rtn", "--set", "quantize.calibration=null"),
        ),
    }[verb]


# The changes on disk of a whole command, at least; a signal comes before one of them.
PLACES = {
    "quantize": (3, 9),
    "quantize a GGUF": (5, 16),
    "train": (4, 30, 70),
    "merge": (4, 12),
    "export gguf": (4, 14),
    "export onnx": (4, 14),
    "evaluate": (2, 5),
    "verify-parity": (4, 15),
    "run": (12, 40),
}
CASES = [(verb, place) for verb, places in PLACES.items() for place in places]
NUMBERS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def kept(path: Path, out: Path) -> bool:
    """What a later command goes on from: whole stages of `run`, complete checkpoints of a training."""
    top = path.relative_to(out).parts[0]
    return top == "run" or top == "a.training"


@pytest.mark.parametrize(("verb", "place"), CASES, ids=lambda value: str(value))
def test_nothing_unfinished_stays(driver: Driver, inputs: Inputs, verb: str, place: int, tmp_path: Path) -> None:
    number = NUMBERS[CASES.index((verb, place)) % len(NUMBERS)]
    times = 1 + 20 * (place == PLACES[verb][-1])
    out = tmp_path / "new" / "out"
    attempt = driver.start(*words(verb, inputs, out), die_at=place, signal=[number, times])
    code = driver.ended()
    assert code == 128 + number, (attempt.changes(), attempt.said())
    said = attempt.said()
    assert said.count(SAID.format(number.name)) == 1 and "Traceback" not in said, said
    left = [path for path in (tmp_path / "new").rglob("*") if path.is_file()]
    assert [path for path in left if path.name.startswith(".") or not kept(path, out)] == []
    assert all((path / "complete.json").exists() for path in out.glob("a.training/checkpoint-*"))
    if not left:
        assert list(tmp_path.iterdir()) == []  # not even the folders that it made


def test_a_training_goes_on_after_a_signal(driver: Driver, inputs: Inputs, tmp_path: Path) -> None:
    command = words("train", inputs, tmp_path)
    driver.start(*command, die_at=PLACES["train"][-1], signal=[signal.SIGTERM, 1])
    assert driver.ended() == 128 + signal.SIGTERM
    assert list(tmp_path.glob("a.training/checkpoint-*"))
    attempt = driver.start(*command)
    assert driver.ended() == 0, attempt.said()
    assert (tmp_path / "a" / "manifest.json").exists()


def test_what_nohup_ignores_stays_ignored(driver: Driver, inputs: Inputs, tmp_path: Path) -> None:
    command = words("export gguf", inputs, tmp_path)
    attempt = driver.start(*command, die_at=6, signal=[signal.SIGHUP, 5], ignored=[signal.SIGHUP])
    assert driver.ended() == 0, attempt.said()


def test_a_runner_ends_with_the_command(driver: Driver, inputs: Inputs, tmp_path: Path) -> None:
    """A runner that never gets as far as loading its package."""
    pid = tmp_path / "pid"
    (tmp_path / "stand-in").mkdir()
    (tmp_path / "stand-in" / "xllamacpp.py").write_text(
        f"import os, pathlib, time\npathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\ntime.sleep(300)\n"
    )
    command = words("verify-parity", inputs, tmp_path / "new")
    attempt = driver.start(*command, environment={"PYTHONPATH": str(tmp_path / "stand-in")})
    wait_for(lambda: pid.exists() and pid.read_text() != "", "no runner was started")
    os.kill(attempt.pid, signal.SIGTERM)
    assert driver.ended() == 128 + signal.SIGTERM, attempt.said()
    assert_ends(int(pid.read_text()))
    assert not (tmp_path / "new").exists()


DEAF = """
import hashlib, sys, threading, time
from pathlib import Path
import qalora_export.cli.signals as signals
import qalora_export.qalora.merge as merge
from qalora_export.cli.main import main
from qalora_export.safety import atomic_directory, exclusive
signals.GRACE = 0.3

def deaf(base, adapter, out, **options):
    with atomic_directory(out) as folder:
        (folder / "half").write_text("x")
        print("there", flush=True)
        while True:
            try:
                time.sleep(30)
            except BaseException:
                pass

merge.merge = deaf
main(["merge", "base", "adapter", "--out", sys.argv[1]])
"""


def test_a_command_that_does_not_hear_is_ended_all_the_same(tmp_path: Path) -> None:
    """A library that swallows the exception stands for one that does not come back from a long call."""
    command = [sys.executable, "-c", DEAF, str(tmp_path / "folder" / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "there\n"
    assert list((tmp_path / "folder").iterdir())
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert SAID.format("SIGTERM") in said
    assert list(tmp_path.iterdir()) == []


def test_the_library_installs_no_handler(inputs: Inputs, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    qalora_export.quantize(inputs.model, tmp_path / "b")
    assert [signal.getsignal(number) for number in NUMBERS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_command_gives_the_handlers_back(capsys: pytest.CaptureFixture[str]) -> None:
    from qalora_export.cli.main import main

    before = [signal.getsignal(number) for number in NUMBERS]
    for _ in range(3):
        with pytest.raises(SystemExit):
            main(["inspect", "nothing"])
    assert [signal.getsignal(number) for number in NUMBERS] == before
    time.sleep(0)
    assert signal.set_wakeup_fd(-1) == -1
