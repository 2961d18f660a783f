"""Exit codes and output when the surroundings are odd: closed pipes, panics, interrupts, narrow and ASCII terminals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qalora_export.cli.main import INTERNAL_ERROR, INTERRUPTED, main
from qalora_export.console import CLOSED_PIPE
from tests.cli import several
from tests.cli.several import ENDED
from tests.conftest import ROOT

COMMAND = [sys.executable, "-m", "qalora_export.cli"]


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    return int(caught.value.code or 0)


def plant(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make `inspect` end in `error`."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("qalora_export.inspection.view.open_view", fail)


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`command` in bash, with $Q as the command line tool and $S for several of its commands in one interpreter."""
    return subprocess.run(
        ["bash", "-c", command],
        env=os.environ | {"Q": " ".join(COMMAND), "S": f"{sys.executable} -m {several.__name__}"} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


class PanicException(BaseException):
    """As pyo3 raises it: no Exception, known by its name."""


def test_a_panic_of_a_native_library_is_bad_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, PanicException("called `Option::unwrap()` on a `None` value"))
    assert run("inspect", "x") == 2
    said = capsys.readouterr().err
    assert "a native library gave up" in said and "unwrap" in said and "Traceback" not in said


def test_an_interrupt_is_130_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, KeyboardInterrupt())
    assert run("inspect", "x") == INTERRUPTED == 128 + signal.SIGINT
    said = capsys.readouterr().err
    assert "interrupted" in said and "Traceback" not in said


INTERRUPT = """
import os, signal, threading, time
import qalora_export.inspection.view as view
from qalora_export.cli.main import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
view.open_view = lambda path: (os.kill(os.getpid(), signal.SIGINT), time.sleep(60))
main(["inspect", "x"])
"""


def test_control_c_in_a_running_command() -> None:
    """The signal itself, as a terminal sends it."""
    done = subprocess.run([sys.executable, "-c", INTERRUPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == INTERRUPTED, done.stderr
    assert "Traceback" not in done.stderr and "interrupted" in done.stderr


DROPPED = """
import os, signal, time
import qalora_export.inspection.view as view
from qalora_export.cli.main import main

class Dropping:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)

def slow(path):
    Dropping()
    os.write(1, b"went on")
    time.sleep(60)

view.open_view = slow
main(["inspect", "x"])
"""


def test_a_signal_whose_exception_python_drops_comes_again() -> None:
    """As it drops one in what libraries have run around a fork."""
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", DROPPED], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "went on")
    assert done.stderr.splitlines() == [
        "interrupted by SIGTERM; finished stages are kept, run the same command again to go on"
    ]
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("error", [ValueError("x"), OSError("no number"), RecursionError(), AssertionError()])
def test_a_defect_is_never_one_of_the_documented_codes(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, error)
    assert run("inspect", "x") == INTERNAL_ERROR == 70
    said = capsys.readouterr().err
    assert "Traceback" in said and type(error).__name__ in said and "please report" in said


@pytest.mark.parametrize("words", ["inspect {model}", "--help", "inspect --help", "doctor", "inspect nothing 2>&1"])
def test_a_closed_pipe_is_quiet_and_neither_a_pass_nor_a_failure(words: str, tiny_model: Path) -> None:
    done = shell(f"$Q {words.format(model=tiny_model)} | exec 0<&-; echo ${{PIPESTATUS[0]}}")
    assert int(done.stdout) == CLOSED_PIPE
    assert done.stderr == ""


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-", "0<&-"])
def test_closed_streams_change_no_exit_code(closed: str, tiny_model: Path) -> None:
    assert shell(f"$Q inspect {tiny_model} {closed}").returncode == 0
    assert shell(f"$Q inspect nothing {closed}").returncode == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_behind_the_output_is_exit_2(tiny_model: Path) -> None:
    done = shell(f"$Q inspect {tiny_model} > /dev/full")
    assert done.returncode == 2
    assert "No space left" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "environment",
    [
        {"COLUMNS": "1"},
        {"LC_ALL": "C"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"TERM": "dumb"},
        {"NO_COLOR": "1", "COLUMNS": "0"},
    ],
    ids=str,
)
def test_poor_terminals_change_no_exit_code(environment: dict[str, str], tiny_model: Path) -> None:
    done = shell(f"$S inspect {tiny_model} , --help , inspect 'é東\\xff' , inspekt é", **environment)
    assert re.findall(f"^{ENDED}(.*)", done.stdout, re.MULTILINE) == ["0", "0", "2", "2"], done.stderr
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


NAMES = (
    "[/b]",
    "[bold]x",
    ":smile:",
    "\x1b[31mred",
    "\x1b]0;title\x07",
    "a\nerror: b",
    "\u202egnp",
    "é" * 200,
    "x" * 5000,
)
PLACES = (("inspect",), ("run",), ("quantize", "--out", "o", "--method", "rtn"), ("no-verb-",), ("inspect", "--no-"))


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:12])
@pytest.mark.parametrize("words", PLACES, ids=" ".join)
def test_any_name_is_printed_as_text(words: tuple[str, ...], name: str, capfd: pytest.CaptureFixture[str]) -> None:
    command = [*words[:-1], words[-1] + name] if words[-1].endswith("-") else [words[0], name, *words[1:]]
    assert run(*command) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert not any(c not in "\n" and not c.isprintable() for c in said)
    assert not any(line.startswith("error: b") for line in said.splitlines())


def test_bytes_that_are_no_text_in_an_argument() -> None:
    done = subprocess.run([*COMMAND, "inspect", b"a\xff\xfeb"], capture_output=True, timeout=120)
    assert done.returncode == 2
    assert b"a\\udcff\\udcfeb" in done.stderr and b"Traceback" not in done.stderr


def test_usage_errors_name_the_help_of_their_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("merge", "a", "b") == 2
    said = capsys.readouterr().err
    assert "error: Missing option '--out'" in said and "next: qalora-export merge --help" in said


@pytest.mark.parametrize("code", [1, "a library gave up"])
def test_a_library_that_exits_by_itself_never_says_that_parity_failed(
    code: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, SystemExit(code))
    assert run("inspect", "x") == INTERNAL_ERROR
