"""How far right exports and one wrong code are from PyTorch on the exact path, at several depths: gate G2's bound.

    python -m tests.benchmarks.rounding --work /tmp/rounding
    python -m tests.benchmarks.rounding --work /tmp/rounding --layers --model merged.qalora    # a real one

Random Llamas of 4, 14 and 30 layers, 4 bits in groups of 32, and any checkpoints; exported to GGUF and ONNX and run on
the exact path over part of the probe set. noise: what float32 rounding alone makes of a position in PyTorch. A wrong
model has one code of one matrix in its middle layer off by one, and is run in PyTorch.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from qalora_runtimes.launch import run_runner

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.safetensors_file import read_header
from qalora_export.checkpoint.weight_files import SINGLE
from qalora_export.models.loading import load_tokenizer
from qalora_export.recipe import VerifySettings
from qalora_export.verify.metrics import PositionMetrics, following_ids, position_metrics
from qalora_export.verify.probes.probe_set import ProbeSet, make_probes
from qalora_export.verify.reference.logits import reference_logprobs, rounding_noise
from qalora_export.verify.runtimes.record import all_runtimes
from qalora_export.verify.runtimes.runs import Runs
from tests.benchmarks.machine import RESULTS, machine
from tests.models import make_tiny_canonical, make_tiny_model
from tests.verify.exports import export_both

LAYERS, FEATURES = (4, 14, 30), 256
SEQUENCES = ("one token repeated", "random ids", "unicode", "code")
RUNTIMES = ("llama.cpp", "onnxruntime")
TRIED = ("self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="*", default=LAYERS)
    parser.add_argument("--model", type=Path, action="append", default=[], help="a checkpoint of your own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=RESULTS / "rounding.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, checkpoint in _models(options):
        rows += list(_rows(name, checkpoint, options.work / name, options.threads))
        found = {"benchmark": "rounding", "machine": machine(), "rows": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    for row in rows:
        print("| " + " | ".join(f"{v:.1e}" if isinstance(v, float) else str(v) for v in row.values()) + " |")


def _models(options: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    for layers in options.layers:
        folder = options.work / f"random-{layers}"
        shutil.rmtree(folder, ignore_errors=True)
        source = make_tiny_model(
            folder / "model", num_hidden_layers=layers, hidden_size=FEATURES, intermediate_size=2 * FEATURES
        )
        yield folder.name, make_tiny_canonical(folder / "base.qalora", source)
    for path in options.model:
        yield path.name.removesuffix(".qalora"), path


def _rows(name: str, checkpoint: Path, work: Path, threads: int) -> Iterator[dict[str, Any]]:
    model = CanonicalCheckpoint(checkpoint)
    layers = model.config["num_hidden_layers"]
    whole = make_probes(load_tokenizer(checkpoint), model.config, VerifySettings())
    probes = whole.some([whole.names.index(name) for name in SEQUENCES])
    exact = reference_logprobs(checkpoint, probes, threads=threads).logprobs
    noise = rounding_noise(checkpoint, probes, exact, threads=threads)

    def against(answers: np.ndarray) -> PositionMetrics:
        found = position_metrics(exact, answers, following_ids(probes.ids, probes.lengths))
        return found.scaled_by(noise)

    def row(which: str, found: PositionMetrics) -> dict[str, Any]:
        summary = found.summary()
        ratio = float(np.median(found.nmse / noise)), float((found.nmse / noise).max())
        figures = summary.nmse_max, summary.nmse_scaled_max, float(noise.max()), *ratio
        names = "largest NMSE", "scaled", "largest noise", "median NMSE / noise", "largest NMSE / noise"
        return {"model": name, "layers": layers, "run": which, **dict(zip(names, figures, strict=True))}

    work.mkdir(parents=True, exist_ok=True)
    exported = export_both(checkpoint, _empty(work / "exported"))
    for runtime in RUNTIMES:
        yield row(runtime, against(_exact_path(runtime, exported, probes, model, work, threads)))
    for leaf in TRIED:
        module = f"model.layers.{layers // 2}.{leaf}"
        wrong = _one_code_off(checkpoint, module, _empty(work / "wrong"))
        yield row(f"one code of {leaf} wrong", against(reference_logprobs(wrong, probes, threads=threads).logprobs))
    shutil.rmtree(work / "wrong")


def _exact_path(
    runtime: str, exported: Any, probes: ProbeSet, model: CanonicalCheckpoint, work: Path, threads: int
) -> np.ndarray:
    record = all_runtimes()[runtime]
    artifact = record.exact(exported.gguf if record.format == "gguf" else exported.onnx, _empty(work / runtime))
    runs = Runs(probes, model.config["vocab_size"], work, threads, run_runner)
    return runs.logprobs(runtime, artifact, "prefill", exact=True)


def _one_code_off(checkpoint: Path, module: str, folder: Path) -> Path:
    """A copy whose matrix differs in its first code's lowest bit."""
    copy = folder / checkpoint.name
    shutil.copytree(checkpoint, copy)
    at = read_header(copy / SINGLE)[f"{module}.codes"].begin
    with (copy / SINGLE).open("r+b") as file:
        file.seek(at)
        old = file.read(1)[0]
        file.seek(at)
        file.write(bytes([old ^ 1]))
    return copy


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    main()
