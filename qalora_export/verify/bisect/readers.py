"""Reading a runtime's inner values at points: extra outputs of the ONNX graph, llama.cpp's evaluation callback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qalora_runtimes.protocol import Job

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.errors import RuntimeUnavailableError
from qalora_export.formats.gguf.permute import hf_order
from qalora_export.models.families import family_of
from qalora_export.verify.bisect.points import Point, onnx_values
from qalora_export.verify.bisect.search import Activations, Failure, Reader
from qalora_export.verify.runtimes.runs import Artifact

LaunchTaps = Callable[..., Any]
THROUGH = {
    "gguf": "llama.cpp's evaluation callback",
    "onnx": "ONNX Runtime, the values as extra outputs of the graph",
}
TAPPED = "tapped.onnx"


def reader_of(
    kind: str,
    artifact: Artifact,
    checkpoint: CanonicalCheckpoint,
    failure: Failure,
    workdir: Path,
    *,
    threads: int,
    launch: LaunchTaps,
) -> Reader:
    """A Reader over the artifact that failed. kind: "gguf" or "onnx". launch: qalora_runtimes.taps.run_taps.

    The Reader raises RuntimeUnavailableError when the runtime is missing, crashes or does not show its graph.
    """

    def taps(ids: NDArray[np.int32], names: list[str], runtime: str, model: Path, **options: Any) -> Activations:
        result = launch(
            runtime,
            model=model,
            job=Job((ids,), failure.mode),
            names=names,
            workdir=workdir,
            exact=failure.path == "exact",
            threads=threads,
            **options,
        )
        if result.status != "ok":
            raise RuntimeUnavailableError(result.message, where=artifact.path)
        return dict(result.taps)

    def from_llama(ids: NDArray[np.int32], points: list[Point]) -> Activations:
        found = taps(ids, [point.node for point in points], "llama.cpp", artifact.path, lora=artifact.lora)
        return {p.key: _hf_columns(found[p.node], p, checkpoint) for p in points if p.node in found}

    def from_onnx(ids: NDArray[np.int32], points: list[Point]) -> Activations:
        values = _write_tapped(artifact.path, points, workdir / TAPPED)
        names = list(values.values())
        found = taps(ids, names, "onnxruntime", workdir / TAPPED, data=artifact.path.resolve())
        return {key: found[name] for key, name in values.items() if name in found}

    workdir.mkdir(parents=True, exist_ok=True)
    return {"gguf": from_llama, "onnx": from_onnx}[kind]


def _hf_columns(value: NDArray[np.float32], point: Point, checkpoint: CanonicalCheckpoint) -> NDArray[np.float32]:
    """Query and key features in Transformers order: their rows are permuted in GGUF."""
    config = checkpoint.config
    heads = family_of(config).permuted_heads(point.module, config) if point.side == "output" else None
    return value if heads is None else value[:, hf_order(value.shape[1], heads)]


def _write_tapped(folder: Path, points: list[Point], out: Path) -> dict[str, str]:
    """The folder's graph with extra outputs, written to `out`. Returns point key -> value name."""
    import onnx

    from qalora_export.formats.onnx.validate import read_model

    model = read_model(folder)
    values = onnx_values(model, points)
    there = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in values.values() if name not in there)
    out.write_bytes(model.SerializeToString())
    return values
