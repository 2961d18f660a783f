"""Both sides' values at chosen points: the float32 reference, hooked, and what a runtime shows of its own graph.

ONNX Runtime gives inner values as extra outputs of the same graph, llama.cpp through its evaluation callback; both read
the very artifact that failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from qalora_runtimes.protocol import Job

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.errors import RuntimeUnavailableError
from qalora_export.formats.gguf.permute import hf_order
from qalora_export.formats.onnx.layout import graph_file
from qalora_export.models.families import family_of
from qalora_export.progress import task
from qalora_export.verify.bisect.forced import PointError, point_errors
from qalora_export.verify.bisect.points import Activations, Point, Shown, onnx_values, value_of
from qalora_export.verify.reference.local_proof import PASS_BYTES
from qalora_export.verify.reference.logits import fixed_threads, float32_model, round_to_int8
from qalora_export.verify.runtimes.record import Artifact
from qalora_export.verify.runtimes.runs import watch_of
from qalora_export.verify.target import RunPath

LaunchTaps = Callable[..., Any]
Reader = Callable[[NDArray[np.int32], list[Point]], Shown]
THROUGH = {
    "gguf": "llama.cpp's evaluation callback",
    "onnx": "ONNX Runtime, the values as extra outputs of the graph",
}
TAPPED = "tapped.onnx"


@dataclass(frozen=True, slots=True)
class Suspect:
    """What to look into: a failed gate's path and mode, and one sequence of the probe set."""

    gate: str
    path: RunPath
    mode: str
    sequence: str
    ids: NDArray[np.int32]


class ReferenceModel:
    """The checkpoint in float32, loaded once. int8 rounds the input of every quantized layer, as int8 kernels do."""

    def __init__(self, checkpoint: Path, *, threads: int) -> None:
        self._threads = threads
        self._model = float32_model(checkpoint)
        self._modules = CanonicalCheckpoint(checkpoint).modules

    def activations(self, ids: NDArray[np.int32], points: list[Point], *, int8: bool = False) -> Activations:
        """Point key -> float32 (positions, features) for one sequence run as a whole prompt."""
        found: Activations = {}
        handles = [self._watch(point, found) for point in points]
        if int8:
            handles += [self._round_input(name, group_size) for name, (_, group_size) in self._modules.items()]
        try:
            with fixed_threads(self._threads), torch.inference_mode():
                self._model(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def errors(self, ids: NDArray[np.int32], points: list[Point], shown: Shown) -> dict[str, PointError]:
        """bisect.forced.point_errors of this model."""
        return point_errors(self._model, ids, points, shown, self._threads)

    def _round_input(self, name: str, group_size: int) -> Any:
        module = self._model.get_submodule(name)
        return module.register_forward_pre_hook(lambda _, x: (round_to_int8(x[0], group_size),))

    def _watch(self, point: Point, found: Activations) -> Any:
        module = self._model.get_submodule(point.module)
        if point.side == "input":
            return module.register_forward_pre_hook(lambda _, x: _keep(found, point, x[0]))
        return module.register_forward_hook(lambda _, __, y: _keep(found, point, value_of(y)))


def _keep(found: Activations, point: Point, value: torch.Tensor) -> None:
    """(1, positions, features) or, heads first, (1, heads, positions, size) -> float32 (positions, features)."""
    rows = value[0].transpose(0, 1) if point.heads_first else value[0]
    found[point.key] = rows.float().flatten(1).numpy().copy()


def reader_of(
    kind: str,
    artifact: Artifact,
    checkpoint: CanonicalCheckpoint,
    suspect: Suspect,
    workdir: Path,
    *,
    threads: int,
    launch: LaunchTaps,
) -> Reader:
    """A Reader over the artifact that failed. kind: "gguf" or "onnx". launch: qalora_runtimes.taps.run_taps.

    The Reader raises RuntimeUnavailableError when the runtime is missing, crashes or does not show its graph.
    """

    def taps(ids: NDArray[np.int32], names: list[str], runtime: str, model: Path, **options: Any) -> Shown:
        job = Job((ids,), suspect.mode)
        count = max(1, PASS_BYTES // (4 * len(ids) * _widest(checkpoint.config)))
        with task(f"{runtime}: values inside", job.total) as shown:
            result = launch(
                runtime,
                model=model,
                job=job,
                names=[names[begin : begin + count] for begin in range(0, len(names), count)],
                workdir=workdir,
                exact=suspect.path == "exact",
                threads=threads,
                watch=watch_of(runtime, artifact.path, job, shown),
                **options,
            )
        if result.status != "ok":
            raise RuntimeUnavailableError(result.message, where=artifact.path)
        found: Shown = result.taps
        return found

    def from_llama(ids: NDArray[np.int32], points: list[Point]) -> Shown:
        found = taps(ids, [point.node for point in points], "llama.cpp", artifact.path, lora=artifact.lora)
        nodes = {point.key: point.node for point in points if point.node in found}
        heads = {point.key: count for point in points if (count := _permuted_heads(point, checkpoint)) is not None}
        return _Values(found, nodes, heads)

    def from_onnx(ids: NDArray[np.int32], points: list[Point]) -> Shown:
        values = _write_tapped(artifact.path, points, workdir / TAPPED)
        names = list(dict.fromkeys(values.values()))
        found = taps(ids, names, "onnxruntime", workdir / TAPPED, data=graph_file(artifact.path).parent.resolve())
        return _Values(found, {key: name for key, name in values.items() if name in found}, {})

    workdir.mkdir(parents=True, exist_ok=True)
    return {"gguf": from_llama, "onnx": from_onnx}[kind]


@dataclass(frozen=True)
class _Values(Mapping[str, NDArray[np.float32]]):
    """The values by key of their point, heads side by side, in Transformers' order; each is read when it is asked for.

    names: by key; heads: by key, where the runtime has the features of each head in another order.
    """

    found: Shown
    names: Mapping[str, str]
    heads: Mapping[str, int]

    def __getitem__(self, key: str) -> NDArray[np.float32]:
        value = self.found[self.names[key]]
        rows = value.reshape(len(value), -1)
        return rows[:, hf_order(rows.shape[1], self.heads[key])] if key in self.heads else rows

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _permuted_heads(point: Point, checkpoint: CanonicalCheckpoint) -> int | None:
    """Heads of queries and keys, whose rows are permuted in GGUF."""
    config = checkpoint.config
    return family_of(config).permuted_heads(point.module, config) if point.side == "output" else None


def _widest(config: Mapping[str, Any]) -> int:
    """Features of the widest value inside a layer, about."""
    return 2 * max(int(config["hidden_size"]), int(config.get("intermediate_size") or 0))


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
