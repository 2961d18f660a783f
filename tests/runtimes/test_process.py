"""A runner that stops, floods, lies about its size or never ends is ended itself, and what it was doing is said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from qalora_runtimes import heartbeat, process
from qalora_runtimes.heartbeat import Beat
from qalora_runtimes.launch import RUNNERS, run_runner
from qalora_runtimes.process import PATIENCE, Watch, patience_for, run_module
from qalora_runtimes.protocol import make_job
from qalora_runtimes.records import Runner

HEADER = """
import os, signal, sys, threading, time
from pathlib import Path
from qalora_runtimes import heartbeat
value = lambda name: Path(sys.argv[sys.argv.index(name) + 1])
heartbeat.EVERY = 0
heartbeat.beat_to(value("--heartbeat"))
heartbeat.at("decode, tokens", 3, 20)
"""
BODIES = {
    "stops itself": "os.kill(os.getpid(), signal.SIGSTOP)",
    "sleeps": "time.sleep(600)",
    "spins": "while True: pass",
    "floods stdout": "while True: sys.stdout.write('x' * 100_000)",
    "floods stderr": "while True: sys.stderr.write('x' * 100_000)",
    "writes without end": "f = value('--out').open('wb')\nwhile True: f.write(b'x' * 1_000_000)",
    "writes without end, unfinished": "f = Path(f\"{value('--out')}.partial\").open('wb')\n"
    "while True: f.write(b'x' * 1_000_000)",
    "answers and stays": "heartbeat.at(heartbeat.ANSWERED)\ntime.sleep(600)",
    "loses its main thread": "threading.Thread(target=time.sleep, args=(600,)).start()\n"
    "import ctypes; ctypes.CDLL(None).syscall(60, 0)",  # SYS_exit ends one thread; the process stays
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def start(body: str, watch: Watch):
        (tmp_path / "planted_runner.py").write_text(HEADER + body)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setitem(RUNNERS, "planted", Runner("planted_runner", "numpy", "nothing"))
        job = make_job([[1, 2]])
        return run_runner("planted", model=tmp_path, job=job, workdir=tmp_path / "work", vocabulary=8, watch=watch)

    return start


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("stops itself", "it is stopped (SIGSTOP) (last: decode, tokens, 3 of 20)"),
        ("sleeps", "made no progress for"),
        ("spins", "(last: decode, tokens, 3 of 20)"),
        ("answers and stays", "wrote its answer and did not end within"),
        pytest.param(
            "loses its main thread",
            "its main thread has ended",
            marks=pytest.mark.skipif(os.uname().machine != "x86_64", reason="the number of SYS_exit is that of x86-64"),
        ),
    ],
)
def test_silence_is_ended_and_what_was_done_is_said(run, body: str, words: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(process, "HALTED_GRACE", 0.5)
    monkeypatch.setattr(process, "EXIT_GRACE", 0.5)
    result = run(BODIES[body], Watch(patience=5))
    assert result.status == "crashed"
    assert words in result.message
    assert result.message.endswith("and was ended")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_flood_is_ended_before_it_fills_the_disk(run, stream: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(process, "MAX_LOG", 1_000_000)
    result = run(BODIES[f"floods {stream}"], Watch())
    assert result.status == "crashed"
    assert "bytes to stderr.txt, more than the 1000000 it may" in result.message
    assert len(result.log) <= process.LOG_TAIL


@pytest.mark.parametrize("body", ["writes without end", "writes without end, unfinished"])
def test_an_answer_without_end_is_ended_before_it_fills_the_disk(run, body: str):
    result = run(BODIES[body], Watch())
    assert result.status == "crashed"
    assert "bytes to logits.npz, more than" in result.message


def test_an_answer_larger_than_the_job_is_not_read(run):
    result = run("value('--out').write_bytes(bytes(400_000_000))\nvalue('--fingerprint').write_text('{}')", Watch())
    assert result.status == "crashed"
    assert "logits.npz has 400000000 bytes" in result.message or "bytes to logits.npz" in result.message


def test_a_fingerprint_that_is_no_object_is_no_answer(run):
    body = "import numpy as np\nfrom qalora_runtimes.protocol import write_answers\n"
    body += "write_answers(value('--out'), [np.zeros((2, 8), np.float32)])\nvalue('--fingerprint').write_text('[1]')"
    assert "no fingerprint" in run(body, Watch()).message


def test_signs_of_life_keep_a_slow_runner_alive_and_reach_the_caller(run):
    told: list[Beat] = []
    body = "for i in range(60):\n    heartbeat.advance()\n    time.sleep(0.1)\nsys.exit('done')"
    result = run(body, Watch(patience=5, on_beat=told.append))
    assert "failed (exit code 1): done" in result.message
    assert told[-1].done > told[0].done
    assert all(beat.total == 20 for beat in told if beat.what == "decode, tokens")


def test_silence_is_told_while_it_lasts(run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(process, "FIRST_NOTICE", 0.5)
    told: list[str] = []
    run(BODIES["sleeps"], Watch(patience=6, on_silence=told.append))
    assert "no progress for" in told[-1] and "3 of 20" in told[-1] and "ended at 6 s" in told[-1]


def test_a_pause_of_the_whole_machine_is_not_held_against_the_runner(tmp_path: Path):
    """Time in which the watcher itself could not look is no silence."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        watcher = process._Watcher(child, tmp_path / "none", {}, Watch(patience=100, timeout=200))
        assert watcher._look(watcher._last_poll + 1) == ""
        assert watcher._look(watcher._last_poll + 10_000) == ""
        looks = [watcher._look(watcher._last_poll + 1) for _ in range(120)]
        assert looks[0] == "" and "no progress" in looks[-1]
    finally:
        child.communicate(b"\n")


def test_patience_grows_with_the_work_and_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tmp_path / "model.gguf"
    with model.open("wb") as file:
        file.truncate(4 << 30)
    assert patience_for(model, 128) > patience_for(model, 8) > patience_for(tmp_path / "none", 8) == 300.0
    assert patience_for(tmp_path, 8) == patience_for(model, 8)
    monkeypatch.setenv(PATIENCE, "12.5")
    assert patience_for(model, 128) == 12.5
    for wrong in ("soon", "-1", "nan", "0"):
        monkeypatch.setenv(PATIENCE, wrong)
        with pytest.raises(ValueError, match=PATIENCE):
            patience_for(model, 128)


def test_the_process_is_ended_when_the_caller_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "planted_runner.py").write_text(
        HEADER + "Path('pid').write_text(str(os.getpid()))\nheartbeat.at('pid')\ntime.sleep(600)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def interrupt(beat: Beat) -> None:
        if beat.what == "pid":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_module("planted_runner", [], tmp_path, Watch(on_beat=interrupt))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_heartbeat_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(heartbeat, "EVERY", 0.0)
    path = tmp_path / "heartbeat.txt"
    assert heartbeat.read(path) == Beat()
    heartbeat.beat_to(path)
    try:
        heartbeat.at("decode, tokens", 5, 9)
        first = heartbeat.read(path)
        heartbeat.advance(2)
        second = heartbeat.read(path)
    finally:
        heartbeat.beat_to(None)
    assert (first.done, first.total, first.what, str(first)) == (5, 9, "decode, tokens", "decode, tokens, 5 of 9")
    assert (second.done, second.steps) == (7, first.steps + 1)
    for junk in (b"", b"1 2", b"x y z w", b"\xff" * 5000, b"1 2 3"):
        path.write_bytes(junk)
        assert heartbeat.read(path) == Beat()
