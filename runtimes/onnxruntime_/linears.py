"""What linear layers give for the identity: their weights as ONNX Runtime's own kernels see them (gate G1).

`python -m qalora_runtimes.onnxruntime_.linears --help`

graphs.npz   "0", "1", …   uint8 (bytes,)    ONNX models, weights inside; one input, float32 (1, k, k)
values.npz   "0", "1", …   float32 (k, out)  the graph's output for the identity: row i is column i of the weight
log          "graph N" before each graph, so that a crash can be laid at its door

Either side holds one graph or one answer at a time.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qalora_runtimes import heartbeat
from qalora_runtimes.arrays import ProtocolError, read_each, write_each
from qalora_runtimes.launch import Status, failure
from qalora_runtimes.onnxruntime_.decoder import ERRORS_ONLY, PROVIDER, import_package
from qalora_runtimes.process import Watch, patience_for, run_module
from qalora_runtimes.runner import EXIT_OK, add_caller, run_guarded
from qalora_runtimes.scoring import Rows, RunnerError

MODULE = "qalora_runtimes.onnxruntime_.linears"
RUNTIME = "onnxruntime"  # in launch.RUNNERS
STARTED = re.compile(r"^graph (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class LinearsResult:
    """values: one float32 (k, out) per graph in order, when status is "ok"; iterating may raise ProtocolError.

    message: one line for the user otherwise; last: number of the graph that was running, where the log tells it.
    """

    status: Status
    message: str = ""
    values: Iterable[Rows] = ()
    last: int | None = None


def run_linears(graphs: Iterable[bytes], workdir: Path, *, watch: Watch | None = None) -> LinearsResult:
    """Run serialized graphs on the identity in a process of its own; never raises for what ONNX Runtime does.

    workdir: made if missing; holds the graphs during the run and the answers until they have been read. watch: how
    long a single graph may take.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    asked, out = workdir / "graphs.npz", workdir / "values.npz"
    out.unlink(missing_ok=True)
    count = write_each(asked, ((str(i), np.frombuffer(graph, np.uint8)) for i, graph in enumerate(graphs)))
    words = ["--graphs", asked, "--count", count, "--out", out]
    ended = run_module(MODULE, words, workdir, watch or Watch(patience_for(asked, 1)))
    asked.unlink()
    if ended.code == EXIT_OK:
        return LinearsResult("ok", values=_read(out, count))
    failed = failure(RUNTIME, ended)
    started = STARTED.findall(ended.log)
    return LinearsResult(failed.status, failed.message, last=int(started[-1]) if started else None)


def _read(path: Path, count: int) -> Iterator[Rows]:
    for wanted, (name, values) in enumerate(read_each(path, required=_names(count), optional=set())):
        if name != str(wanted):
            raise ProtocolError(f"{path}: answer {name} stands in the place of {wanted}")
        yield values
    path.unlink()


def _names(count: int) -> set[str]:
    return {str(i) for i in range(count)}


def on_identity(onnxruntime: Any, graph: bytes) -> Rows:
    """The first output of a serialized model for the identity, (k, out). Raises RunnerError."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=[PROVIDER])
        (x,), y = session.get_inputs(), session.get_outputs()[0].name
        return session.run([y], {x.name: np.eye(x.shape[-1], dtype=np.float32)[None]})[0][0]
    except Exception as error:  # its exception classes have no other base in common
        raise RunnerError(f"ONNX Runtime cannot run a linear layer: {error}") from error


def arguments() -> argparse.Namespace:
    out = argparse.ArgumentParser(prog=f"python -m {MODULE}", description="Run linear layers on the identity.")
    out.add_argument("--graphs", type=Path, required=True, help="graphs.npz to run")
    out.add_argument("--count", type=int, required=True, help="how many graphs it holds")
    out.add_argument("--out", type=Path, required=True, help="values.npz to write")
    add_caller(out)
    return out.parse_args()


def _run(options: argparse.Namespace) -> None:
    onnxruntime = import_package()
    graphs = read_each(options.graphs, required=_names(options.count), optional=set())
    write_each(options.out, _answers(onnxruntime, graphs))


def _answers(onnxruntime: Any, graphs: Iterable[tuple[str, NDArray[Any]]]) -> Iterator[tuple[str, Rows]]:
    for name, graph in graphs:
        sys.stderr.write(f"graph {name}\n")
        sys.stderr.flush()
        heartbeat.at("linear layers", int(name))
        yield name, on_identity(onnxruntime, graph.tobytes())


if __name__ == "__main__":
    parsed = arguments()
    sys.exit(run_guarded(parsed, lambda: _run(parsed)))
