"""A runner whose caller is killed ends with it: it would keep memory, cores and the folder of the next run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from qalora_runtimes.launch import RUNNERS
from qalora_runtimes.onnxruntime_ import linears

RUNNER = "import os, time; from qalora_runtimes.runner import _die_with; _die_with(int(os.environ['CALLER']));"
CALLER = f"""
import os, subprocess, sys
code = {RUNNER!r} + "print(os.getpid(), flush=True); time.sleep(300)"
subprocess.Popen([sys.executable, "-c", code], env=os.environ | {{"CALLER": str(os.getpid())}}).wait()
"""


# A package that never gets as far as running anything, and callers that wait for it.
HANGS = """
import os, pathlib, time
pathlib.Path(os.environ["PID_FILE"]).write_text(str(os.getpid()))
time.sleep(300)
"""
CALLERS = {
    "run_runner": "from qalora_runtimes.launch import run_runner\n"
    "run_runner('onnxruntime', model=here, job=make_job([[1]]), workdir=here)",
    "run_taps": "from qalora_runtimes.taps import run_taps\n"
    "run_taps('onnxruntime', model=here, job=make_job([[1]]), names=[], workdir=here)",
    "run_linears": "from qalora_runtimes.onnxruntime_.linears import run_linears\nrun_linears([b''], here)",
}


def runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_runner_ends_with_its_caller() -> None:
    with subprocess.Popen([sys.executable, "-c", CALLER], stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        runner = int(caller.stdout.readline())
        assert runs(runner)
        caller.kill()
    assert_ends(runner)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell no process that its parent died")
@pytest.mark.parametrize("caller", CALLERS)
def test_whatever_is_started_ends_with_its_caller(caller: str, tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text(HANGS)
    pid = tmp_path / "pid"
    code = f"from pathlib import Path\nfrom qalora_runtimes.protocol import make_job\nhere = Path({str(tmp_path)!r})\n"
    process = subprocess.Popen(
        [sys.executable, "-c", code + CALLERS[caller]],
        env=os.environ | {"PYTHONPATH": str(tmp_path), "PID_FILE": str(pid)},
    )
    try:
        wait_for(lambda: pid.exists() and pid.read_text() != "", "nothing was started")
    finally:
        process.kill()
        process.wait()
    assert_ends(int(pid.read_text()))


def assert_ends(pid: int) -> None:
    wait_for(lambda: not runs(pid), "the runner lives on")


def wait_for(happened: Callable[[], bool], otherwise: str) -> None:
    for _ in range(1500):
        if happened():
            return
        time.sleep(0.02)
    pytest.fail(otherwise)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell no process that its parent died")
@pytest.mark.parametrize(
    "module", [*(r.module for r in RUNNERS.values()), *(r.taps for r in RUNNERS.values() if r.taps), linears.MODULE]
)
def test_every_runner_refuses_to_work_for_nobody(module: str, tmp_path: Path) -> None:
    words = {
        "--model": tmp_path,
        "--job": tmp_path,
        "--names": tmp_path,
        "--graphs": tmp_path,
        "--out": tmp_path / "o",
        "--fingerprint": tmp_path / "f",
        "--count": 0,
    }
    help_text = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True).stdout
    given = [str(word) for pair in words.items() if pair[0] in help_text for word in pair]
    done = subprocess.run([sys.executable, "-m", module, *given, "--parent", str(1 << 30)], capture_output=True)
    assert (done.returncode, done.stderr) == (2, b"")


def test_a_runner_that_starts_too_late_refuses() -> None:
    code = "from qalora_runtimes.runner import _die_with; _die_with(1 << 30)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == (2 if sys.platform == "linux" else 0)
