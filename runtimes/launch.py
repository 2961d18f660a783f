"""Start a runner in a process of its own, survive whatever it does, and say what happened and what to do.

A kernel that segfaults is a finding about the runtime, not a crash of the caller.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import pkgutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import qalora_runtimes
from qalora_runtimes.protocol import Job, Logprobs, ProtocolError, read_answers, read_job, write_job
from qalora_runtimes.records import Runner
from qalora_runtimes.runner import EXIT_MISSING, EXIT_OK

Status = Literal["ok", "missing", "crashed"]
STDERR_TAIL = 4000  # characters
DEFAULT_TIMEOUT = 3600.0  # seconds


def _found() -> dict[str, Runner]:
    """Name -> runner of every package here that says it is one."""
    packages = [item.name for item in pkgutil.iter_modules(qalora_runtimes.__path__) if item.ispkg]
    modules = [importlib.import_module(f"qalora_runtimes.{name}") for name in packages]
    return {module.NAME: module.RUNNER for module in sorted(modules, key=lambda module: str(module.NAME))}


RUNNERS = _found()
REMEDIES = {
    "SIGSEGV": "a kernel read outside its memory: install another version of the package",
    "SIGILL": "the package was built for a newer CPU than this one: install a wheel for this CPU or build from source",
    "SIGKILL": "most likely out of memory: use fewer threads, a smaller model or a machine with more memory",
    "SIGABRT": "the runtime stopped itself; its last words are in the log",
    "SIGBUS": "a file was cut short while it was mapped, or memory ran out: check the model file and the disk",
    "SIGFPE": "a kernel divided by zero: check the model's shapes",
}


@dataclass(frozen=True)
class RunnerResult:
    """logprobs float32 (total, vocab) when status is "ok". message: one line for the user; log: end of stderr."""

    status: Status
    message: str = ""
    logprobs: Logprobs | None = None
    text_answers: dict[str, Any] | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    signal_name: str | None = None
    log: str = ""


@dataclass(frozen=True)
class Availability:
    """version is None where the package is not installed."""

    name: str
    package: str
    artifact: str
    version: str | None


def available() -> list[Availability]:
    """Which runtimes are installed here; reads package metadata, imports nothing."""
    return [Availability(name, r.package, r.artifact, _version(r.package)) for name, r in RUNNERS.items()]


def run_runner(
    name: str,
    *,
    model: Path,
    job: Path | Job,
    workdir: Path,
    exact: bool = False,
    threads: int = 2,
    lora: Path | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    options: Sequence[str] = (),
) -> RunnerResult:
    """Run one job in one runtime. Never raises for what the runtime does; see RunnerResult.status.

    workdir: made if missing; holds logits.npz, fingerprint.json and stderr.txt afterwards. timeout: seconds.
    lora and options go to the runner's command line. Raises KeyError for an unknown name (see RUNNERS) and
    ProtocolError for a bad job.
    """
    runner = RUNNERS[name]
    workdir.mkdir(parents=True, exist_ok=True)
    if isinstance(job, Job):
        write_job(workdir / "job.npz", job)
        job = workdir / "job.npz"
    positions = read_job(job).total
    out, fingerprint = workdir / "logits.npz", workdir / "fingerprint.json"
    out.unlink(missing_ok=True)
    fingerprint.unlink(missing_ok=True)
    words = [
        "--model",
        model,
        "--job",
        job,
        "--out",
        out,
        "--fingerprint",
        fingerprint,
        "--threads",
        threads,
        *(["--exact"] if exact else []),
        *(["--lora", lora] if lora else []),
        *options,
    ]
    code, log = run_module(runner.module, words, workdir / "stderr.txt", timeout)
    if code != EXIT_OK:
        return failure(name, code, timeout, log)
    return _answer(name, out, fingerprint, positions, log)


def run_module(module: str, words: Sequence[object], log: Path, timeout: float) -> tuple[int | None, str]:
    """Exit code (None after a timeout, −n after signal n) and the end of what was written to stdout and stderr.

    The module is told its caller (runner.add_parent), so that it does not outlive one that is killed.
    """
    command = [sys.executable, "-P", "-m", module, *map(str, words), "--parent", str(os.getpid())]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        try:
            code: int | None = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    return code, log.read_text(encoding="utf-8", errors="replace")[-STDERR_TAIL:]


def _answer(name: str, out: Path, fingerprint: Path, positions: int, log: str) -> RunnerResult:
    try:
        logprobs, text_answers = read_answers(out, positions=positions)
        report = json.loads(fingerprint.read_text(encoding="utf-8"))
    except (ProtocolError, OSError, ValueError) as error:
        return RunnerResult("crashed", f"{name} ended without a usable answer: {error}", log=log)
    return RunnerResult("ok", "", logprobs, text_answers, report, log=log)


def failure(name: str, code: int | None, timeout: float, log: str) -> RunnerResult:
    """What run_module's answer other than EXIT_OK says about the runtime `name` of RUNNERS."""
    if code == EXIT_MISSING:
        return RunnerResult("missing", f"{name}: {_last_line(log)}", log=log)
    if code is None:
        return RunnerResult("crashed", f"{name} gave no answer within {timeout:g} s and was stopped", log=log)
    if code > 0:
        return RunnerResult("crashed", f"{name} failed (exit code {code}): {_last_line(log)}", log=log)
    signal_name = _signal_name(-code)
    general = REMEDIES.get(signal_name, "its last words are in the log")
    remedy = RUNNERS[name].remedies.get(signal_name, general)
    package = RUNNERS[name].package
    version = _version(package) or "of unknown version"
    message = f"{name} ({package} {version}) was ended by {signal_name}: {remedy}"
    return RunnerResult("crashed", message, signal_name=signal_name, log=log)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_line(log: str) -> str:
    lines = log.strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
