"""A runner whose caller is killed ends with it: it would keep memory, cores and the folder of the next run."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

RUNNER = "import os, time; from qalora_runtimes.runner import _die_with; _die_with(int(os.environ['CALLER']));"
CALLER = f"""
import os, subprocess, sys
code = {RUNNER!r} + "print(os.getpid(), flush=True); time.sleep(300)"
subprocess.Popen([sys.executable, "-c", code], env=os.environ | {{"CALLER": str(os.getpid())}}).wait()
"""


def runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_runner_ends_with_its_caller() -> None:
    caller = subprocess.Popen([sys.executable, "-c", CALLER], stdout=subprocess.PIPE, text=True)
    assert caller.stdout is not None
    runner = int(caller.stdout.readline())
    assert runs(runner)
    caller.kill()
    caller.wait()
    for _ in range(500):
        if not runs(runner):
            return
        time.sleep(0.02)
    pytest.fail("the runner lives on")


def test_a_runner_that_starts_too_late_refuses() -> None:
    code = "from qalora_runtimes.runner import _die_with; _die_with(1 << 30)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == (2 if sys.platform == "linux" else 0)
