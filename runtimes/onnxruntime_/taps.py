"""Values inside an ONNX decoder: a graph whose extra outputs are the values asked for.

`python -m qalora_runtimes.onnxruntime_.taps --help`
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from qalora_runtimes import taps
from qalora_runtimes.onnxruntime_.decoder import Decoder
from qalora_runtimes.protocol import Ids, Job
from qalora_runtimes.scoring import Rows


class TappedDecoder(Decoder):
    """taps.Tapped on a graph file that has every name among its outputs, as (1, sequence, features)."""

    def __init__(self, graph: Path, threads: int, *, data: Path | None) -> None:
        super().__init__(graph, threads, data=data)
        self._names: list[str] = []
        self._read: list[taps.Taps] = []

    def taps(self, ids: Ids, names: Sequence[str], *, decode: bool) -> taps.Taps:
        self._names, self._read = [name for name in names if name in self._outputs], []
        if decode:
            self.decode(ids)
        else:
            self._run(ids, 0, self._empty())
        return {name: np.concatenate([part[name] for part in self._read]) for name in self._names}

    def _run(self, ids: Ids, start: int, cache: dict[str, Any]) -> tuple[Rows, dict[str, Any]]:
        outputs = [*self._names, *(slot.present for slot in self._slots)]
        values = self._outputs_of(outputs, {**self._feeds(ids, start), **cache})
        read, present = values[: len(self._names)], values[len(self._names) :]
        self._read.append(
            {name: v.numpy().astype(np.float32)[0] for name, v in zip(self._names, read, strict=True)}
        )  # (sequence, features)
        kept = {slot.past: value for slot, value in zip(self._slots, present, strict=True)}
        return np.empty((len(ids), 0), np.float32), kept


def arguments() -> argparse.Namespace:
    out = taps.parser("qalora_runtimes.onnxruntime_.taps", "Read values inside an ONNX decoder.")
    out.add_argument("--data", type=Path, help="folder of the graph's external data (default: the graph's own)")
    return out.parse_args()


def open_runtime(options: argparse.Namespace, job: Job) -> TappedDecoder:
    decoder = TappedDecoder(options.model, options.threads, data=options.data)
    decoder.check_job(job)
    return decoder


if __name__ == "__main__":
    sys.exit(taps.main(arguments(), open_runtime))
