"""How many right models the local proof of gate G3 passes, and how many wrong kernels it catches.

    python -m tests.benchmarks.kernel_proof --work /tmp/kernel-proof
    python -m tests.benchmarks.kernel_proof --work /tmp/kernel-proof --emulate Haswell --json avx2.json      # QEMU

Random Llamas of 2 layers in every width of codes and group, as quantized and with offsets moved as a merge moves them,
as they are and with one channel of every norm × 64, so that activations have outliers; exported to GGUF (q4_1 where a
file holds it, split) and ONNX. A right model is green when every product and everything between products is within its
bound, prompts and decode. A wrong kernel is one product of one of these runs × 1.001; it is caught when that product is
red. The file is written anew after every model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from qalora_runtimes.protocol import Job
from qalora_runtimes.taps import run_taps
from safetensors.numpy import load_file, save_file

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.canonical_writer import CanonicalWriter
from qalora_export.errors import InputError
from qalora_export.formats.gguf.export import export_gguf
from qalora_export.formats.onnx.export import export_onnx
from qalora_export.grid import GroupAffine
from qalora_export.recipe import GgufSettings, OnnxSettings
from qalora_export.verify.kernels.arithmetic import BACKWARD
from qalora_export.verify.kernels.products import TappedGraph, deviation
from qalora_export.verify.reference.local_proof import (
    DECODED,
    SHORTER,
    Mode,
    Sequences,
    Taps,
    passes_of,
    prove,
)
from qalora_export.verify.runtimes.record import all_runtimes
from tests.benchmarks.machine import RESULTS, machine
from tests.models import make_tiny_canonical, make_tiny_model

BITS, GROUPS, OUTLIERS, MERGED = (2, 3, 4, 8), (32, 64, 128), (1, 64), (False, True)
LAYOUTS = {"q4_1": "llama.cpp", "split": "llama.cpp", "onnx": "onnxruntime"}
WRONG = np.float32(1.001)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, default=RESULTS / "kernel_proof.json")
    parser.add_argument("--smoke", action="store_true", help="one model")
    parser.add_argument("--emulate", metavar="CPU", help="run the runtimes on this x86-64 CPU of QEMU: other kernels")
    options = parser.parse_args()
    models = list(itertools.product(BITS, GROUPS, OUTLIERS, MERGED))
    if options.emulate:
        models = [model for model in models if model[1] != GROUPS[1] and not model[3]]  # emulation is slow
        _emulate(options.emulate, options.work)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for model in models[:1] if options.smoke else models:
        rows += _model(options.work, *model)
        where = machine() | ({"emulated": options.emulate} if options.emulate else {})
        found = {"benchmark": "kernel_proof", "machine": where, "summary": _summary(rows), "rows": rows}
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(_summary(rows), indent=2))


def _emulate(cpu: str, work: Path) -> None:
    """Runners start as `sys.executable -m …`: from now on that is Python on an emulated CPU."""
    wrapper = work / "python-emulated"
    work.mkdir(parents=True, exist_ok=True)
    wrapper.write_text(f'#!/bin/sh\nexec qemu-x86_64-static -cpu {cpu} {sys.executable} "$@" 2>/dev/null\n')
    wrapper.chmod(0o755)
    sys.executable = str(wrapper)


def _model(work: Path, bits: int, group: int, outlier: int, merged: bool) -> Iterator[dict[str, Any]]:
    folder = work / f"{bits}-{group}-{outlier}-{merged}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    checkpoint = _checkpoint(folder, bits, group, outlier, merged)
    for layout, runtime in LAYOUTS.items():
        if (artifact := _exported(checkpoint, folder, layout)) is not None:
            named = {"bits": bits, "group": group, "outlier": outlier, "merged": merged}
            yield named | {"layout": layout, "runtime": runtime} | _measured(checkpoint, artifact, runtime, folder)
    shutil.rmtree(folder)


def _checkpoint(folder: Path, bits: int, group: int, outlier: int, merged: bool) -> Path:
    model = make_tiny_model(folder / "model", hidden_size=256, intermediate_size=512)
    tensors = load_file(model / "model.safetensors")
    for name in [name for name in tensors if "norm" in name]:
        tensors[name][5] *= outlier
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    base = make_tiny_canonical(folder / "base", model, bits=bits, group=group)
    return _merged(base, folder / "merged") if merged else base


def _merged(base: Path, out: Path) -> Path:
    """Offsets moved by a fifth of their spread."""
    source, random = CanonicalCheckpoint(base), np.random.default_rng(0)
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    with CanonicalWriter(out, config, source.companions(), kind="base") as writer:
        for module in source.modules:
            m = source.group_affine(module)
            moved = m.offset + random.normal(0, 0.2 * m.offset.std(), m.offset.shape)
            writer.add_quantized(module, GroupAffine(m.codes, m.scale, moved.astype(np.float16), m.bits))
        for name in source.plain_names():
            writer.add(name, np.asarray(source.tensor(name)))
    return out


def _exported(checkpoint: Path, folder: Path, layout: str) -> Path | None:
    """None where the layout does not hold the checkpoint."""
    if layout == "onnx":
        export_onnx(checkpoint, folder / "onnx", OnnxSettings())
        return folder / "onnx"
    try:
        export_gguf(checkpoint, folder / f"{layout}.gguf", GgufSettings(layout=layout))
    except InputError:
        return None
    return folder / f"{layout}.gguf"


def _measured(checkpoint: Path, artifact: Path, runtime: str, folder: Path) -> dict[str, Any]:
    record, source = all_runtimes()[runtime], CanonicalCheckpoint(checkpoint)
    graph = record.tapped_graph(record.shipped(artifact), source, folder / "graph")
    random = np.random.default_rng(1)
    ids = tuple(random.integers(0, source.config["vocab_size"], n).astype(np.int32) for n in (67, 1, *SHORTER))
    sequences: dict[Mode, Sequences] = {"prefill": ids, "decode": tuple(part[:DECODED] for part in ids)}
    values = {mode: _taps(graph, runtime, mode, asked, folder / mode) for mode, asked in sequences.items()}
    proof = prove(
        checkpoint,
        graph,
        lambda mode, _: values[mode],
        sequences,
        half_cache=record.half_cache,
        half_activation=False,
        threads=1,
    )
    error = max(layer.worst.backward for layer in proof.layers)
    excess = max(layer.excess for layer in proof.layers)
    caught = [_caught(graph, values["prefill"], index) for index in range(len(list(_products(graph))))]
    return {
        "products": len(caught),
        "product_error": error,
        "between_excess": excess,
        "green": not proof.untapped and error <= BACKWARD and excess <= 1,
        "wrong": len(caught),
        "caught": sum(caught),
    }


def _taps(graph: TappedGraph, runtime: str, mode: Mode, asked: Sequences, workdir: Path) -> Taps:
    job = Job(asked, mode)
    result = run_taps(
        runtime,
        model=graph.model,
        job=job,
        names=passes_of(graph, job.total),
        workdir=workdir,
        threads=1,
        lora=graph.lora,
        data=graph.data,
    )
    if result.status != "ok":
        raise RuntimeError(result.message)
    return dict(result.taps)


def _products(graph: TappedGraph) -> Iterator[Any]:
    return (product for linear in graph.linears for product in linear.products)


def _caught(graph: TappedGraph, values: Mapping[str, np.ndarray], index: int) -> bool:
    product = list(_products(graph))[index]
    x, y = (values[name].reshape(len(values[name]), -1) for name in (product.x, product.y))
    return deviation(product, x, y * WRONG).backward > BACKWARD


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    total = Counter[str]()
    for row in rows:
        total += Counter({"models": 1, "green": int(row["green"]), "wrong": row["wrong"], "caught": row["caught"]})
    return dict(total) | {
        "largest_product_error": max(row["product_error"] for row in rows),
        "largest_between_excess": max(row["between_excess"] for row in rows),
    }


if __name__ == "__main__":
    main()
