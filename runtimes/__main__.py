"""What runs on this device, and running it: `python -m qalora_runtimes [RUNTIME OPTIONS…]`."""

from __future__ import annotations

import argparse
import runpy
import sys

import qalora_runtimes
from qalora_runtimes.launch import RUNNERS, available
from qalora_runtimes.runner import EXIT_OK


def main(words: list[str]) -> int:
    """List the runtimes, or hand the words after the first over to the runner it names; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m qalora_runtimes",
        description="Without a runtime: which ones are installed here. With one: run a job in it.",
        epilog="example: python -m qalora_runtimes onnxruntime --model onnx --job job.npz --out logits.npz "
        "--fingerprint fingerprint.json",
    )
    parser.add_argument("--version", action="version", version=f"qalora-runtimes {qalora_runtimes.__version__}")
    parser.add_argument("runtime", nargs="?", choices=sorted(RUNNERS), help="see RUNTIME --help for its options")
    parser.add_argument("options", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.runtime is None:
        sys.stdout.write(listing())
        return EXIT_OK
    module = RUNNERS[given.runtime].module
    sys.argv = [module, *given.options]
    runpy.run_module(module, run_name="__main__", alter_sys=True)  # leaves with the runner's exit code
    return EXIT_OK


def listing() -> str:
    """One line a runtime: its name, what it runs, the installed version or how to get it."""
    lines = []
    for found in available():
        state = f"{found.package} {found.version}" if found.version else f"not installed: pip install {found.package}"
        lines.append(f"{found.name:18} {found.artifact:12} {state}\n")
    return "".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
