"""Intermediate values ("taps") of a run, for finding the layer and tensor where a runtime leaves the reference.

names.json   JSON list of strings, what to read: the runtime's own names (values of an ONNX graph, nodes of llama.cpp)
taps.npz     "0", "1", …   float32 (total, features): the value named names[i], at every position of the job in order;
             a name that the runtime does not have is left out
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from qalora_runtimes import heartbeat
from qalora_runtimes.launch import RUNNERS, Status, failure
from qalora_runtimes.process import Watch, patience_for, run_module
from qalora_runtimes.protocol import Ids, Job, ProtocolError, read_arrays, read_job, write_arrays, write_job
from qalora_runtimes.runner import EXIT_OK, add_caller, run_guarded

Taps = dict[str, NDArray[np.float32]]


class Tapped(Protocol):
    """A runtime that also gives the values `names` for each sequence: one float32 (len(ids), features) per name."""

    def taps(self, ids: Ids, *, decode: bool) -> Taps:
        """decode: token by token with the KV cache; else the whole prompt as one batch."""


@dataclass(frozen=True)
class TapsResult:
    """taps: by the runtime's own name, when status is "ok"; message: one line for the user otherwise."""

    status: Status
    message: str = ""
    taps: Taps = field(default_factory=dict)


def run_taps(
    runtime: str,
    *,
    model: Path,
    job: Job,
    names: Sequence[str],
    workdir: Path,
    exact: bool = False,
    threads: int = 2,
    lora: Path | None = None,
    data: Path | None = None,
    watch: Watch | None = None,
) -> TapsResult:
    """Run one job in a process of its own and read `names` on the way; never raises for what the runtime does.

    data: folder of an ONNX graph's external data where it is not the graph's own. watch: as in
    launch.run_runner.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    out = workdir / "taps.npz"
    write_job(workdir / "job.npz", job)
    (workdir / "names.json").write_text(json.dumps(list(names)), encoding="utf-8")
    out.unlink(missing_ok=True)
    words = [
        "--model",
        model,
        "--job",
        workdir / "job.npz",
        "--names",
        workdir / "names.json",
        "--out",
        out,
        "--threads",
        threads,
        *(["--exact"] if exact else []),
        *(["--lora", lora] if lora else []),
        *(["--data", data] if data else []),
    ]
    module = RUNNERS[runtime].taps
    if module is None:
        raise KeyError(f"{runtime} does not show what is inside its graph")
    watch = watch or Watch(patience_for(data or model, job.longest))
    ended = run_module(module, words, workdir, watch)
    if ended.code != EXIT_OK:
        failed = failure(runtime, ended)
        return TapsResult(failed.status, failed.message)
    try:
        found = read_arrays(out, required=set(), optional={str(i) for i in range(len(names))})
    except ProtocolError as error:
        return TapsResult("crashed", f"{runtime} ended without usable values: {error}")
    return TapsResult("ok", "", {name: found[str(i)] for i, name in enumerate(names) if str(i) in found})


def parser(module: str, description: str) -> ArgumentParser:
    out = ArgumentParser(prog=f"python -m {module}", description=description)
    out.add_argument("--model", type=Path, required=True, help="model to run")
    out.add_argument("--job", type=Path, required=True, help="job.npz to run")
    out.add_argument("--names", type=Path, required=True, help="names.json: what to read")
    out.add_argument("--out", type=Path, required=True, help="taps.npz to write")
    out.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    out.add_argument("--exact", action="store_true", help="rounding-free settings of this runtime")
    add_caller(out)
    return out


def main(arguments: Namespace, open_runtime: Callable[[Namespace, Job, list[str]], Tapped]) -> int:
    """The runner's side; returns the exit code (see qalora_runtimes.runner)."""
    return run_guarded(arguments, lambda: _run(arguments, open_runtime))


def _run(arguments: Namespace, open_runtime: Callable[[Namespace, Job, list[str]], Tapped]) -> None:
    job, names = read_job(arguments.job), _read_names(arguments.names)
    heartbeat.at("loading the model")
    runtime = open_runtime(arguments, job, names)
    found = []
    for number, ids in enumerate(job.sequences):
        heartbeat.at(f"{job.mode}, tokens", sum(map(len, job.sequences[:number])), job.total)
        found.append(runtime.taps(ids, decode=job.mode == "decode"))
    arrays = {
        str(i): np.concatenate([part[name] for part in found])
        for i, name in enumerate(names)
        if all(name in part for part in found)
    }
    write_arrays(arguments.out, arrays)


def _read_names(path: Path) -> list[str]:
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ProtocolError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ProtocolError(f"{path}: expected a list of names")
    return names
