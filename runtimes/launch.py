"""Start a runner in a process of its own, survive whatever it does, and say what happened and what to do.

A kernel that segfaults is a finding about the runtime, not a crash of the caller.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import pkgutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import qalora_runtimes
from qalora_runtimes.arrays import ProtocolError
from qalora_runtimes.process import Ended, Watch, patience_for, run_module
from qalora_runtimes.protocol import MAX_TEXT_BYTES, Job, Logprobs, read_answers, read_job, write_job
from qalora_runtimes.records import Runner
from qalora_runtimes.runner import EXIT_MISSING, EXIT_OK, EXIT_REFUSED

Status = Literal["ok", "missing", "refused", "crashed"]  # refused: it said that it cannot run this
MAX_VOCABULARY = 1 << 20  # tokens, where the caller does not know better
MAX_FINGERPRINT = 1 << 20  # bytes


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
    """logprobs float32 (total, vocab) when status is "ok", decoded too in mode "both".

    message: one line for the user; log: end of stderr.
    """

    status: Status
    message: str = ""
    logprobs: Logprobs | None = None
    text_answers: dict[str, Any] | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    signal_name: str | None = None
    log: str = ""
    decoded: Logprobs | None = None
    behaviour: dict[str, Any] | None = None
    long: Logprobs | None = None


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
    model: Path | None,
    job: Path | Job,
    workdir: Path,
    exact: bool = False,
    threads: int = 2,
    lora: Path | None = None,
    vocabulary: int = MAX_VOCABULARY,
    options: Sequence[str] = (),
    watch: Watch | None = None,
) -> RunnerResult:
    """Run one job in one runtime. Never raises for what the runtime does; see RunnerResult.status.

    model: None where the options name something else that runs (--server). workdir: made if missing; holds logits.npz,
    fingerprint.json and stderr.txt afterwards. vocabulary: bounds the answer. lora and options go to the runner's
    command line. watch: how long it may be silent, by default what the model and the longest sequence need. Raises
    KeyError for an unknown name (see RUNNERS) and ProtocolError for a bad job.
    """
    runner = RUNNERS[name]
    workdir.mkdir(parents=True, exist_ok=True)
    if isinstance(job, Job):
        write_job(workdir / "job.npz", job)
        job = workdir / "job.npz"
    asked = read_job(job)
    out, fingerprint = workdir / "logits.npz", workdir / "fingerprint.json"
    out.unlink(missing_ok=True)
    fingerprint.unlink(missing_ok=True)
    words = [
        *([] if model is None else ["--model", model]),
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
    watch = watch or Watch(patience_for(model or workdir, asked.longest))
    limits = limits_of(out, fingerprint, asked, vocabulary)
    ended = run_module(runner.module, words, workdir, replace(watch, limits={**watch.limits, **limits}))
    if ended.code != EXIT_OK:
        return failure(name, ended)
    return answer_in(name, out, fingerprint, asked, vocabulary, ended.log)


def limits_of(out: Path, fingerprint: Path, asked: Job, vocabulary: int) -> dict[Path, int]:
    """Bytes that an answer may have. A model may pad its vocabulary; what is larger than twice that is no answer."""
    rows = len(asked.passes) * asked.total + (len(asked.long.at) if asked.long else 0)
    return {out: 8 * rows * vocabulary + 2 * MAX_TEXT_BYTES, fingerprint: MAX_FINGERPRINT}


def answer_in(name: str, out: Path, fingerprint: Path, asked: Job, vocabulary: int, log: str) -> RunnerResult:
    """What a runner wrote, checked; status "crashed" where it is no answer to what was asked."""
    limits = limits_of(out, fingerprint, asked, vocabulary)
    try:
        for path, limit in limits.items():
            if path.stat().st_size > limit:
                raise ProtocolError(f"{path.name} has {path.stat().st_size} bytes, more than the {limit} it may have")
        answers = read_answers(out, positions=asked.total)
        if (answers.decoded is None) != (len(asked.passes) == 1):
            raise ProtocolError(f"{out.name} does not hold what mode {asked.mode!r} asks for")
        report = json.loads(fingerprint.read_text(encoding="utf-8"))
    except (ProtocolError, OSError, ValueError) as error:
        return RunnerResult("crashed", f"{name} ended without a usable answer: {error}", log=log)
    if not isinstance(report, dict):
        return RunnerResult("crashed", f"{name} ended without a usable answer: no fingerprint", log=log)
    said = answers.text, report, None, log
    return RunnerResult("ok", "", answers.logprobs, *said, answers.decoded, answers.behaviour, answers.long)


def failure(name: str, ended: Ended) -> RunnerResult:
    """What an end other than EXIT_OK says about the runtime `name` of RUNNERS."""
    code, log = ended.code, ended.log
    if code is None:
        return RunnerResult("crashed", f"{name} {ended.why} and was ended", log=log)
    if code == EXIT_MISSING:
        return RunnerResult("missing", f"{name}: {_last_line(log)}", log=log)
    if code == EXIT_REFUSED:
        return RunnerResult("refused", f"{name} refuses (exit code {code}): {_last_line(log)}", log=log)
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
