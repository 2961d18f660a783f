"""Run an ONNX decoder in ONNX Runtime. `python -m qalora_runtimes.onnxruntime_ --help`."""

from __future__ import annotations

import argparse
import sys

from qalora_runtimes.onnxruntime_.decoder import Decoder
from qalora_runtimes.protocol import Job
from qalora_runtimes.runner import Runtime, main, parser


def arguments() -> argparse.Namespace:
    out = parser(
        "qalora_runtimes.onnxruntime_",
        "Run an ONNX decoder in ONNX Runtime on the CPU.",
        model_help="folder with onnx/model.onnx, or the file; --exact expects accuracy_level 1",
    )
    return out.parse_args()


def open_runtime(options: argparse.Namespace, job: Job) -> Runtime:
    decoder = Decoder(options.model, options.threads, exact=options.exact)
    decoder.check_job(job)
    return decoder


if __name__ == "__main__":
    sys.exit(main(arguments(), open_runtime))
