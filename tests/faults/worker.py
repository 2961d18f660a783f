"""The product's own runners kept open in one process per runtime, so that a suite of many small runs is quick.

`python -m tests.faults.worker RUNTIME` reads one JSON request per line and answers with one JSON line. "fault" plants a
fault of the runtime itself: a KV cache that is off by one while decoding.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from qalora_runtimes.launch import RunnerResult, run_runner
from qalora_runtimes.protocol import read_answers, read_job, write_answers
from qalora_runtimes.runner import run_pass
from qalora_runtimes.scoring import MissingRuntimeError, RunnerError
from qalora_runtimes.taps import TapsResult, output_of, run_taps

from tests.faults.line import GGUF_NAME, MODULE

SCALED_KERNEL = "one kernel × 1.001"


class Workers:
    """Stands in for qalora_runtimes.launch.run_runner; questions about text go to the real one."""

    def __init__(self) -> None:
        self.fault = ""
        self._processes: dict[str, subprocess.Popen] = {}

    def __call__(
        self,
        name: str,
        *,
        model: Path,
        job: Path,
        workdir: Path,
        exact: bool = False,
        threads: int = 2,
        lora: Path | None = None,
        **watched: Any,
    ) -> RunnerResult:
        request = read_job(job)
        if request.text is not None:
            return run_runner(
                name, model=model, job=job, workdir=workdir, exact=exact, threads=threads, lora=lora, **watched
            )
        out = workdir / "logits.npz"
        asked = {
            "model": str(model),
            "job": str(job),
            "out": str(out),
            "exact": exact,
            "threads": threads,
            "lora": str(lora) if lora else None,
            "fault": self.fault,
        }
        process = self._process(name)
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            del self._processes[name]
            return RunnerResult("crashed", f"{name} died")
        answer = json.loads(line)
        if answer["status"] != "ok":
            return RunnerResult(answer["status"], answer["message"])
        answers = read_answers(out, positions=request.total)
        return RunnerResult("ok", "", answers.logprobs, None, {"runtime": name}, decoded=answers.decoded)

    def taps(self, runtime: str, *, model: Path, **options: Any) -> TapsResult:
        """Values inside the real runtime; with SCALED_KERNEL one product gives 1.001 times what it should."""
        result = run_taps(runtime, model=model, **options)
        if self.fault != SCALED_KERNEL or result.status != "ok":
            return result
        name = output_of(GGUF_NAME) if runtime == "llama.cpp" else _onnx_product(model)
        if name not in result.taps:  # asked for other values, by the bisect
            return result
        return replace(result, taps={**result.taps, name: result.taps[name] * np.float32(1.001)})

    def close(self) -> None:
        for process in self._processes.values():
            process.stdin.close()
            process.wait(60)
            process.stdout.close()

    def _process(self, name: str) -> Any:
        if name not in self._processes:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.worker", name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parents[2],
            )
        return self._processes[name]


def _onnx_product(graph: Path) -> str:
    import onnx

    nodes = onnx.load(graph, load_external_data=False).graph.node
    return next(node.output[0] for node in nodes if f"{MODULE}.codes" in node.input)


def open_runtime(name: str, options: argparse.Namespace, job: Any) -> Any:
    if name == "llama.cpp":
        from qalora_runtimes.llama_cpp.wheel import open_wheel

        return open_wheel(options, job)
    if name == "onnxruntime":
        from qalora_runtimes.onnxruntime_.__main__ import open_runtime as open_decoder

        return open_decoder(options, job)
    from qalora_runtimes.genai.__main__ import open_runtime as open_genai

    return open_genai(options, job)


def llama_off_by_one(runtime: Any, ids: np.ndarray) -> np.ndarray:
    """Every step sees a cache that ends one token too early."""
    rows = []
    for at in range(len(ids)):
        runtime._context.clear()
        if at > 1:
            runtime._context.run(ids[: at - 1], 0)
        rows.append(runtime._context.run(ids[at : at + 1], max(at - 1, 0)))
    return np.concatenate(rows)


def onnx_off_by_one(runtime: Any, ids: np.ndarray) -> np.ndarray:
    """Every step sees a cache that ends one token too early."""
    cache, rows = runtime._empty(), []
    for at in range(len(ids)):
        short = {name: runtime._value(value.numpy()[:, :, : max(at - 1, 0)].copy()) for name, value in cache.items()}
        row, _ = runtime._run(ids[at : at + 1], max(at - 1, 0), short)
        _, cache = runtime._run(ids[at : at + 1], at, cache)
        rows.append(row)
    return np.concatenate(rows)


OFF_BY_ONE = {"llama.cpp": llama_off_by_one, "onnxruntime": onnx_off_by_one}


def answer(name: str, request: dict[str, Any], kept: list[Any]) -> dict[str, str]:
    path = {key: Path(request[key]) if request[key] else None for key in ("model", "job", "out", "lora")}
    options = argparse.Namespace(
        **path, exact=request["exact"], threads=request["threads"], through="auto", backend="xllamacpp", server=None
    )
    try:
        job = read_job(path["job"])
        runtime = open_runtime(name, options, job)
        kept[:] = [runtime]  # llama.cpp calls back into the newest library object
        if request["fault"] and request["fault"] != SCALED_KERNEL:
            runtime.decode = lambda ids: OFF_BY_ONE[name](runtime, ids)
        passes = [run_pass(runtime, job, each, {}) for each in job.passes]
    except MissingRuntimeError as error:
        return {"status": "missing", "message": str(error)}
    except RunnerError as error:
        return {"status": "crashed", "message": str(error)}
    write_answers(path["out"], passes)
    return {"status": "ok", "message": ""}


def serve(name: str) -> None:
    kept: list[Any] = []
    for line in sys.stdin:
        result = answer(name, json.loads(line), kept)
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
