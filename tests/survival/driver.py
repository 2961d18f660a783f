"""Starts `qalora-export` many times without paying for its imports each time: import once, fork per attempt.

One JSON line on stdin per list of attempts that run together: [{"arguments": [...], "log": path, "die_at": n or null,
"delay": seconds}, ...]. Answers on stdout, a line each: the process ids as they start, then the statuses (exit code, or
−n after signal n) in the same order. The attempt leads a process group of its own, so that the caller can kill it with
everything it started.

die_at: the attempt kills itself before its n-th change of the file system (rename, remove, mkdir, rmdir, open for
writing), which reaches the narrow places between two changes that a clock hardly ever hits. The number of changes an
attempt made is left in LOG.changes. signal: [number, times], to be sent at that change instead. environment: variables
to set. folder: where to run. prepare: [module, argument], whose function `prepare` is called with it first.

Started as `python -m tests.survival.driver`.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

# Imported here so that attempts need not; none of them starts a thread, which would not survive the fork.
import matplotlib.pyplot  # noqa: F401
import mobius  # noqa: F401
import onnx  # noqa: F401
import torch.distributed.fsdp
import torch.utils.tensorboard  # noqa: F401
import transformers.integrations
import transformers.models.llama.modeling_llama
import transformers.trainer  # noqa: F401

import qalora_export
import qalora_export.cli.main
import qalora_export.cli.run_summary
import qalora_export.formats.onnx.graph
import qalora_export.formats.onnx.hosts
import qalora_export.formats.onnx.rewrite
import qalora_export.models.loading
import qalora_export.preflight.machine
import qalora_export.qalora.training.plots
import qalora_export.qalora.training.trainer
from tests.survival.changes import count_changes, send

qalora_export.preflight.machine.PRODUCT_SECONDS = 0.01
for public in qalora_export.__all__:
    getattr(qalora_export, public)


def attempt(request: dict) -> None:
    """In the forked child: become a group, redirect, run the command line. Never returns."""
    os.setsid()
    log = os.open(request["log"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, target)
    time.sleep(request.get("delay", 0.0))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a job in the background may begin with one ignored
        signal.signal(number, signal.SIG_DFL if number not in request.get("ignored", ()) else signal.SIG_IGN)
    sent = request.get("signal")
    count_changes(
        Path(request["log"] + ".changes"), request.get("die_at"), None if sent is None else partial(send, *sent)
    )
    os.environ.update(request.get("environment", {}))
    os.chdir(request.get("folder", "."))
    if "prepare" in request:
        module, argument = request["prepare"]
        importlib.import_module(module).prepare(argument)
    code = 1
    try:
        qalora_export.cli.main.main(request["arguments"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    gc.freeze()  # a collection in a child would copy all that is imported here
    say = sys.stdout
    say.write("ready\n")
    say.flush()
    for line in sys.stdin:
        children = []
        for request in json.loads(line):
            child = os.fork()
            if child == 0:
                attempt(request)
            children.append(child)
            say.write(f"{child}\n")
            say.flush()
        for child in children:
            _, status = os.waitpid(child, 0)
            say.write(f"{os.waitstatus_to_exitcode(status)}\n")
            say.flush()


if __name__ == "__main__":
    main()
