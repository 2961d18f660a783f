"""Runners' processes without their start: one process per runtime has imported it, and forks for every run.

`python -m tests.warm_runners MODULE` reads one JSON request per line, {"module", "words", "log", "prepare"}, runs the
module as `python -m` would in a forked child, and answers with its exit code (−n after signal n). A kernel that crashes
still takes only the child with it. prepare: [module, argument], whose function `prepare` is called first; faults of a
runtime are planted so.

What is left out beside the start is the watch over a silent process; tests/runtimes/test_process.py is about that.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qalora_runtimes.process import LOG_TAIL, Ended, Watch

PACKAGES = {"llama_cpp": "xllamacpp", "onnxruntime_": "onnxruntime", "genai": "onnxruntime_genai"}
USERS = ("launch", "taps", "onnxruntime_.linears")  # modules of qalora_runtimes that start runners


class WarmRunners:
    """Stands in for qalora_runtimes.process.run_module."""

    def __init__(self) -> None:
        self.prepare: tuple[str, str] | None = None
        self._processes: dict[str, subprocess.Popen[str]] = {}

    def __call__(self, module: str, words: Sequence[object], workdir: Path, watch: Watch) -> Ended:
        process, log = self._process(module), workdir / "stderr.txt"
        assert process.stdin is not None and process.stdout is not None
        asked = {"module": module, "words": list(map(str, words)), "log": str(log), "prepare": self.prepare}
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        code = int(process.stdout.readline())
        return Ended(code, log.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL:])

    def close(self) -> None:
        for process in self._processes.values():
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()
            process.wait(60)
            process.stdout.close()

    def _process(self, module: str) -> subprocess.Popen[str]:
        runtime = module.split(".")[1]
        if runtime not in self._processes:
            self._processes[runtime] = subprocess.Popen(
                [sys.executable, "-m", "tests.warm_runners", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parents[1],
                env=os.environ | {"OMP_WAIT_POLICY": "passive"},
            )
        return self._processes[runtime]


def serve(module: str) -> None:
    package = ".".join(module.split(".")[:2])
    for name in (PACKAGES[package.split(".")[1]], f"{package}.__main__"):
        importlib.import_module(name)
    gc.freeze()  # a collection in a child would copy all that is imported here
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(run(request))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def run(request: dict[str, Any]) -> int:
    """In the child: the exit code of `python -m module words`."""
    log = os.open(request["log"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, target)
    try:
        if request["prepare"]:
            module, argument = request["prepare"]
            importlib.import_module(module).prepare(argument)
        sys.argv = [request["module"], *request["words"]]
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
