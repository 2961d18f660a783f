"""Run a GGUF model in llama.cpp. `python -m qalora_runtimes.llama_cpp --help`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from qalora_runtimes.llama_cpp.client import Client
from qalora_runtimes.llama_cpp.python_binding import open_binding
from qalora_runtimes.llama_cpp.server import ServerRuntime
from qalora_runtimes.llama_cpp.wheel import open_wheel
from qalora_runtimes.protocol import Job
from qalora_runtimes.runner import Runtime, main, parser
from qalora_runtimes.scoring import RunnerError

BACKENDS = {"xllamacpp": open_wheel, "llama-cpp-python": open_binding}
API_KEY = "LLAMA_API_KEY"  # llama-server's own name for it
ELSEWHERE = {"settings": "those the server was started with"}


def arguments() -> argparse.Namespace:
    out = parser(
        "qalora_runtimes.llama_cpp",
        "Run a GGUF model in llama.cpp.",
        model_required=False,
        model_help="model.gguf (not with --server)",
    )
    out.add_argument("--lora", type=Path, help="adapter GGUF, loaded by llama.cpp itself at scale 1")
    out.add_argument(
        "--backend", choices=sorted(BACKENDS), default="xllamacpp", help="Python package (default xllamacpp)"
    )
    out.add_argument(
        "--through",
        choices=("auto", "c-api", "server"),
        default="auto",
        help="xllamacpp: C API (fast), its server (slow), or the first that works (default)",
    )
    out.add_argument("--server", metavar="URL", help="ask a running llama-server, for instance http://device:8080")
    out.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"key of that server (default: ${API_KEY})",
    )
    return out.parse_args()


def api_key(file: Path | None) -> str | None:
    """The key of a running llama-server, never from the command line, which every user of the machine can read."""
    if file is None:
        return os.environ.get(API_KEY)
    key = file.read_text(encoding="utf-8").strip()
    if not key:
        raise RunnerError(f"{file} holds no key")
    return key


def open_runtime(options: argparse.Namespace, job: Job) -> Runtime:
    if options.server is not None:
        if options.exact or options.lora is not None or options.model is not None:
            raise RunnerError(
                "--server decides model, adapter and settings itself: start llama-server with "
                "-m, --lora and, for exact runs, -ctk f32 -ctv f32 -fa off --no-repack"
            )
        return ServerRuntime(
            Client(options.server, key=api_key(options.api_key_file)), job, version=None, settings=ELSEWHERE
        )
    if options.model is None:
        raise RunnerError("give --model FILE or --server URL")
    if options.lora is not None and not options.lora.exists():
        raise RunnerError(f"adapter not found: {options.lora}")
    return BACKENDS[options.backend](options, job)


if __name__ == "__main__":
    sys.exit(main(arguments(), open_runtime))
