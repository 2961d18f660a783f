"""Intermediate values ("taps") of a run, for finding the layer and tensor where a runtime leaves the reference.

names.json   JSON list of passes, each a list of strings, what to read: the runtime's own names (values of an ONNX
             graph, nodes of llama.cpp). The job runs once for every pass, and memory holds the values of one pass.
taps.npz     "0", "1", …   float32 (total, features): the value of the i-th name of all passes, at every position of the
             job in order; a name that the runtime does not have is left out
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from qalora_runtimes import heartbeat
from qalora_runtimes.arrays import ProtocolError, Stored, write_each
from qalora_runtimes.launch import RUNNERS, Status, failure
from qalora_runtimes.process import Watch, patience_for, run_module
from qalora_runtimes.protocol import Ids, Job, read_job, write_job
from qalora_runtimes.runner import EXIT_OK, add_caller, run_guarded

Taps = dict[str, NDArray[np.float32]]
ENDS = (" input", " output")


def input_of(weight: str) -> str:
    """The name by which to ask what a matrix product with the tensor `weight` saw, (positions, in)."""
    return weight + ENDS[0]


def output_of(weight: str) -> str:
    """… and what it gave, (positions, out), before any bias."""
    return weight + ENDS[1]


class Tapped(Protocol):
    """A runtime that also gives the values `names` for each sequence: one float32 (len(ids), features) per name."""

    def taps(self, ids: Ids, names: Sequence[str], *, decode: bool) -> Taps:
        """Those of `names` that it has. decode: token by token with the KV cache; else the whole prompt at once."""


@dataclass(frozen=True)
class TapsResult:
    """taps: by the runtime's own name, when status is "ok"; message: one line for the user otherwise.

    Values are read from the answer in the run's workdir when they are asked for.
    """

    status: Status
    message: str = ""
    taps: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


class StoredTaps(Mapping[str, NDArray[np.float32]]):
    """The values in a taps.npz by name; one is read, and checked, each time it is asked for. Raises ProtocolError."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self._arrays = Stored(path, required=set(), optional={str(i) for i in range(len(names))})
        there = set(self._arrays.names)
        self._stored = {name: str(i) for i, name in enumerate(names) if str(i) in there}

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return self._arrays.read(self._stored[name])

    def __contains__(self, name: object) -> bool:
        return name in self._stored  # that of Mapping would read the values

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def run_taps(
    runtime: str,
    *,
    model: Path,
    job: Job,
    names: Sequence[str] | Sequence[Sequence[str]],
    workdir: Path,
    exact: bool = False,
    threads: int = 2,
    lora: Path | None = None,
    data: Path | None = None,
    watch: Watch | None = None,
) -> TapsResult:
    """Run one job in a process of its own and read `names` on the way; never raises for what the runtime does.

    names: of one pass, or a list of passes; each name once.
    data: folder of an ONNX graph's external data where it is not the graph's own. watch: as in
    launch.run_runner.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    out = workdir / "taps.npz"
    write_job(workdir / "job.npz", job)
    passes = [[name] if isinstance(name, str) else list(name) for name in names]
    if all(isinstance(name, str) for name in names):
        passes = [[name for some in passes for name in some]]
    (workdir / "names.json").write_text(json.dumps(passes), encoding="utf-8")
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
        return TapsResult("ok", "", StoredTaps(out, [name for some in passes for name in some]))
    except ProtocolError as error:
        return TapsResult("crashed", f"{runtime} ended without usable values: {error}")


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


def main(arguments: Namespace, open_runtime: Callable[[Namespace, Job], Tapped]) -> int:
    """The runner's side; returns the exit code (see qalora_runtimes.runner)."""
    return run_guarded(arguments, lambda: _run(arguments, open_runtime))


def _run(arguments: Namespace, open_runtime: Callable[[Namespace, Job], Tapped]) -> None:
    job, passes = read_job(arguments.job), read_names(arguments.names)
    heartbeat.at("loading the model")
    runtime = open_runtime(arguments, job)
    write_each(arguments.out, _values(runtime, job, passes))


def _values(runtime: Tapped, job: Job, passes: list[list[str]]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """(number of the name, values), the values of one pass in memory at a time."""
    number = 0
    for names in passes:
        found = []
        for at, ids in enumerate(job.sequences):
            heartbeat.at(job.mode + heartbeat.TOKENS, sum(map(len, job.sequences[:at])), job.total)
            found.append(runtime.taps(ids, names, decode=job.mode == "decode"))
        for index, name in enumerate(names, number):
            if all(name in part for part in found):
                yield str(index), np.concatenate([part[name] for part in found])
        number += len(names)


def read_names(path: Path) -> list[list[str]]:
    """The passes of a names.json. Raises ProtocolError."""
    try:
        passes = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ProtocolError(f"{path}: not valid JSON: {error}") from error
    whole = isinstance(passes, list) and all(isinstance(names, list) for names in passes)
    if not whole or not all(isinstance(name, str) for names in passes for name in names):
        raise ProtocolError(f"{path}: expected a list of lists of names")
    return [list(names) for names in passes]
