"""The part all runners share: arguments, the run itself, timing, output files, exit codes.

Exit codes: 0 answered · 2 the job, the model or the request cannot be run (one line on stderr) · 3 the runtime's
package is not installed. Anything else, or death by a signal, is a crash of the runtime.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from qalora_runtimes import heartbeat
from qalora_runtimes.arrays import ProtocolError
from qalora_runtimes.behaviour import Request
from qalora_runtimes.fingerprint import machine, peak_rss_bytes
from qalora_runtimes.protocol import Ids, Job, Logprobs, LongSequence, TextRequest, read_job, write_answers
from qalora_runtimes.scoring import MissingRuntimeError, Rows, RunnerError, log_softmax

EXIT_OK, EXIT_REFUSED, EXIT_MISSING = 0, 2, 3
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Runtime(Protocol):
    """An opened model. Rows are raw logits or log-probabilities, float32 (len(ids), vocab)."""

    def prefill(self, ids: Ids) -> Rows:
        """All positions of a prompt, by the kernels the runtime uses for prompts."""

    def decode(self, ids: Ids) -> Rows:
        """All positions, one token per step on the KV cache."""

    def text_answers(self, request: TextRequest) -> dict[str, Any] | None:
        """protocol.TEXT_ANSWER_KEYS, or None where the runtime has no tokenizer."""

    def behave(self, request: Request) -> dict[str, Any]:
        """behaviour.ANSWER_KEYS: what the runtime generates with the defaults that ship."""

    def long(self, sequence: LongSequence) -> Rows:
        """Rows (k, vocab) at the positions that are asked for, the sequence run chunk by chunk on the KV cache."""

    def describe(self) -> dict[str, Any]:
        """ "runtime", "package", "version", "settings": what ran and every setting that changes numbers."""


@runtime_checkable
class SideBySide(Protocol):
    """A Runtime that can decode several sequences in each step."""

    def decode_steps(self, job: Job) -> Iterator[tuple[list[int], Rows]] | None:
        """Numbers of positions of the job and their rows, every position once; None: ask decode() instead."""


def parser(module: str, description: str, *, model_help: str, model_required: bool = True) -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    out.add_argument("--model", type=Path, required=model_required, help=model_help)
    out.add_argument("--job", type=Path, required=True, help="job.npz to run")
    out.add_argument("--out", type=Path, required=True, help="logits.npz to write")
    out.add_argument("--fingerprint", type=Path, required=True, help="fingerprint.json to write")
    out.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    out.add_argument("--exact", action="store_true", help="rounding-free settings of this runtime")
    add_caller(out)
    return out


def add_caller(out: argparse.ArgumentParser) -> None:
    """The options that process.run_module gives to everything it starts; see run_guarded."""
    out.add_argument("--parent", type=int, help="process that reads the answer; die with it (Linux)")
    out.add_argument("--heartbeat", type=Path, help="file for signs of life (qalora_runtimes.heartbeat)")


def main(arguments: argparse.Namespace, open_runtime: Callable[[argparse.Namespace, Job], Runtime]) -> int:
    """Run one job; returns the exit code."""
    return run_guarded(arguments, lambda: _run(arguments, open_runtime))


def run_guarded(arguments: argparse.Namespace, work: Callable[[], None]) -> int:
    """Do a runner's work, ended early by the death of the caller; returns the exit code."""
    if arguments.parent is not None:
        _die_with(arguments.parent)
    heartbeat.beat_to(arguments.heartbeat)
    try:
        work()
        heartbeat.at(heartbeat.ANSWERED)
    except MissingRuntimeError as error:
        return _fail(EXIT_MISSING, error)
    except (ProtocolError, RunnerError, OSError) as error:
        return _fail(EXIT_REFUSED, error)
    return EXIT_OK


def _run(arguments: argparse.Namespace, open_runtime: Callable[[argparse.Namespace, Job], Runtime]) -> None:
    job = read_job(arguments.job)
    if arguments.threads < 1:
        raise RunnerError(f"--threads is {arguments.threads}, it must be at least 1")
    if arguments.model is not None and not arguments.model.exists():
        raise RunnerError(f"model not found: {arguments.model}")
    heartbeat.at("loading the model")
    started = time.perf_counter()
    runtime = open_runtime(arguments, job)
    load_seconds = time.perf_counter() - started
    heartbeat.at("texts")
    text_answers = runtime.text_answers(job.text) if job.text else None
    heartbeat.at("answers")
    behaviour = runtime.behave(job.behaviour) if job.behaviour else None
    seconds: dict[str, float] = {}
    passes = (run_pass(runtime, job, each, seconds) for each in job.passes)
    heartbeat.at("a long sequence")
    long = log_softmax(runtime.long(job.long)) if job.long else None
    write_answers(arguments.out, passes, text_answers, behaviour, long)
    report = _fingerprint(runtime, job, arguments, seconds, load_seconds)
    arguments.fingerprint.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _die_with(parent: int) -> None:
    """Ask the kernel to end this process when its parent is killed: nobody would read the answer."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # killed before the request
            sys.exit(EXIT_REFUSED)


def run_pass(runtime: Runtime, job: Job, each: str, seconds: dict[str, float]) -> Logprobs:
    """Log-probabilities (total, vocab) in the order of the job's ids; seconds[each]: those spent in the runtime.

    each: one of job.passes.
    """
    heartbeat.at("first token")
    runtime.prefill(job.sequences[0][:1])  # first touch of the weights is not throughput
    steps = runtime.decode_steps(job) if each == "decode" and isinstance(runtime, SideBySide) else None
    if steps is None:
        steps = _sequence_by_sequence({"prefill": runtime.prefill, "decode": runtime.decode}[each], job)
    out: Logprobs | None = None
    seconds[each], done, started = 0.0, 0, time.perf_counter()
    heartbeat.at(each + heartbeat.TOKENS, 0, job.total)
    for positions, rows in steps:
        seconds[each] += time.perf_counter() - started
        if rows.ndim != 2 or len(rows) != len(positions) or (out is not None and rows.shape[1] != out.shape[1]):
            raise RunnerError(f"the runtime returned logits of shape {rows.shape} for {len(positions)} tokens")
        if out is None:
            out = np.empty((job.total, rows.shape[1]), dtype=np.float32)
        out[positions] = log_softmax(rows)
        done += len(positions)
        heartbeat.at(each + heartbeat.TOKENS, done, job.total)
        started = time.perf_counter()
    if out is None or done != job.total:
        raise RunnerError(f"the runtime answered {done} of {job.total} positions")
    return out


def _sequence_by_sequence(step: Callable[[Ids], Rows], job: Job) -> Iterator[tuple[list[int], Rows]]:
    start = 0
    for ids in job.sequences:
        yield list(range(start, start + len(ids))), step(ids)
        start += len(ids)


def check_vocabulary(job: Job, vocabulary: int) -> None:
    """Raises RunnerError where an id is outside the model's vocabulary: runtimes read out of bounds there."""
    largest = max(int(ids.max()) for ids in job.sequences)
    largest = max(largest, job.behaviour.largest if job.behaviour else 0, int(job.long.ids.max()) if job.long else 0)
    if largest >= vocabulary:
        raise RunnerError(f"token id {largest} is outside the model's vocabulary of {vocabulary}")


def _fingerprint(
    runtime: Runtime, job: Job, arguments: argparse.Namespace, seconds: dict[str, float], load: float
) -> dict[str, Any]:
    speed = {f"{each}_tokens_per_second": None for each in ("prefill", "decode")}
    measured = {f"{each}_tokens_per_second": round(job.total / took, 2) for each, took in seconds.items() if took}
    return {
        **runtime.describe(),
        "mode": job.mode,
        "exact": arguments.exact,
        "threads": arguments.threads,
        "positions": job.total,
        **speed,
        **measured,
        "load_seconds": round(load, 3),
        "peak_rss_bytes": peak_rss_bytes(),
        "machine": machine(),
    }


def _fail(code: int, error: Exception) -> int:
    sys.stderr.write(f"{error}\n")
    return code
