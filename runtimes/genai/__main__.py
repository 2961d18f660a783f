"""Run an ONNX folder in ONNX Runtime GenAI. `python -m qalora_runtimes.genai --help`."""

from __future__ import annotations

import argparse
import sys

from qalora_runtimes.genai.generator import GenaiRuntime
from qalora_runtimes.protocol import Job
from qalora_runtimes.runner import Runtime, main, parser


def arguments() -> argparse.Namespace:
    out = parser(
        "qalora_runtimes.genai",
        "Run an ONNX folder in ONNX Runtime GenAI.",
        model_help="folder with genai_config.json; --exact expects accuracy_level 1",
    )
    return out.parse_args()


def open_runtime(options: argparse.Namespace, job: Job) -> Runtime:
    return GenaiRuntime(options.model, options.threads, job, exact=options.exact)


if __name__ == "__main__":
    sys.exit(main(arguments(), open_runtime))
