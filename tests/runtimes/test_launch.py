"""A runner that crashes, hangs, lies or is absent never takes the caller with it; the signal is named."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from qalora_runtimes import launch
from qalora_runtimes.arrays import ProtocolError
from qalora_runtimes.launch import RUNNERS, available, run_runner
from qalora_runtimes.process import Watch
from qalora_runtimes.protocol import make_job, write_answers
from qalora_runtimes.records import Runner

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "runtimes").rglob("*.py"))
BODIES = {
    "segfault": "import os, signal; print('last words', flush=True); os.kill(os.getpid(), signal.SIGSEGV)",
    "illegal": "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "hang": "import time; time.sleep(600)",
    "exit": "import sys; sys.exit('cannot do it')",
    "silent": "",
    "junk": "import sys; open(sys.argv[sys.argv.index('--out') + 1], 'wb').write(b'junk')",
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(body, …): a runner whose whole program is BODIES[body], under the name of a real one if given."""

    def start(body: str, name: str = "planted", **options):
        (tmp_path / "planted_runner.py").write_text(BODIES[body])
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        remedies = RUNNERS[name].remedies if name in RUNNERS else {}
        monkeypatch.setitem(RUNNERS, name, Runner("planted_runner", "numpy", "nothing", remedies=remedies))
        return run_runner(name, model=tmp_path, job=make_job([[1, 2]]), workdir=tmp_path / "work", **options)

    return start


@pytest.mark.parametrize(
    ("body", "signal_name", "remedy"),
    [
        ("segfault", "SIGSEGV", "another version"),
        ("illegal", "SIGILL", "newer CPU"),
        ("killed", "SIGKILL", "out of memory"),
    ],
)
def test_the_signal_is_named_and_the_remedy_suggested(run, body, signal_name, remedy):
    result = run(body)
    assert (result.status, result.signal_name) == ("crashed", signal_name)
    assert signal_name in result.message
    assert remedy in result.message
    assert importlib.metadata.version("numpy") in result.message
    assert ("last words" in result.log) == (body == "segfault")


def test_a_known_crash_of_one_runtime_has_a_remedy_of_its_own(run):
    assert "AMX" in run("segfault", "llama.cpp").message
    assert "AMX" not in run("segfault", "onnxruntime").message


def test_a_runner_that_hangs_is_stopped(run):
    started = time.monotonic()
    result = run("hang", watch=Watch(timeout=1))
    assert result.status == "crashed"
    assert "within 1 s" in result.message
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("exit", "exit code 1): cannot do it"),
        ("silent", "without a usable answer"),
        ("junk", "without a usable answer"),
    ],
)
def test_a_runner_that_fails_or_lies_is_no_success(run, body, words):
    result = run(body)
    assert result.status == "crashed"
    assert words in result.message
    assert result.signal_name is None


def test_an_old_answer_is_never_taken_for_a_new_one(run, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "logits.npz").write_bytes(b"old")
    run("silent")
    assert not (tmp_path / "work" / "logits.npz").exists()


def test_a_bad_job_or_an_unknown_runtime_is_the_callers_mistake(tmp_path):
    (tmp_path / "job.npz").write_bytes(b"junk")
    with pytest.raises(ProtocolError):
        run_runner("onnxruntime", model=tmp_path, job=tmp_path / "job.npz", workdir=tmp_path)
    with pytest.raises(KeyError):
        run_runner("tensorrt", model=tmp_path, job=make_job([[1]]), workdir=tmp_path)


def test_available_tells_versions_without_importing(monkeypatch):
    found = {item.name: item for item in available()}
    assert set(found) == {"llama.cpp", "onnxruntime", "onnxruntime-genai"}
    assert found["onnxruntime"].version == importlib.metadata.version("onnxruntime")
    monkeypatch.setitem(RUNNERS, "llama.cpp", Runner("m", "surely-not-installed", "GGUF file"))
    assert {item.name: item.version for item in available()}["llama.cpp"] is None
    code = "import sys, qalora_runtimes.launch as l; l.available(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"onnxruntime", "onnxruntime_genai", "xllamacpp", "torch", "qalora_export"} & set(loaded)


@pytest.mark.parametrize("runner", RUNNERS.values(), ids=RUNNERS)
def test_every_runner_starts_from_any_folder(runner, tmp_path):
    done = subprocess.run([sys.executable, "-m", runner.module, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--fingerprint" in done.stdout
    assert done.stdout.startswith(f"usage: python -m {runner.module}")


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_runners_need_numpy_and_their_runtime_only(path):
    """No torch, nothing of qalora_export: this package goes to the device alone."""
    allowed = {
        *sys.stdlib_module_names,
        "numpy",
        "qalora_runtimes",
        "xllamacpp",
        "llama_cpp",
        "onnxruntime",
        "onnxruntime_genai",
    }
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    assert {name.split(".")[0] for name in names} <= allowed


def test_every_signal_in_the_table_exists():
    import signal

    assert all(name in signal.Signals.__members__ for name in launch.REMEDIES)
    assert all(set(runner.remedies) <= set(launch.REMEDIES) for runner in RUNNERS.values())


@pytest.mark.parametrize(("mode", "passes"), [("both", 1), ("prefill", 2), ("decode", 2)])
def test_an_answer_with_other_passes_than_asked_is_none(mode: str, passes: int, tmp_path: Path):
    out, fingerprint, job = tmp_path / "logits.npz", tmp_path / "fingerprint.json", make_job([[1, 2]], mode)
    write_answers(out, [np.zeros((2, 8), np.float32)] * passes)
    fingerprint.write_text("{}")
    found = launch.answer_in("onnxruntime", out, fingerprint, job, 8, "")
    assert found.status == "crashed"
    assert f"mode '{mode}'" in found.message
