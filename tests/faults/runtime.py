"""Faults of a runtime itself, planted in the process of its runner or in the values that it gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from qalora_runtimes.taps import TapsResult, output_of, run_taps

from tests.faults.line import GGUF_NAME, MODULE

SCALED_KERNEL = "one kernel × 1.001"


def scaled_taps(runtime: str, *, model: Path, **options: Any) -> TapsResult:
    """Values inside the real runtime, where one product gives 1.001 times what it should."""
    result = run_taps(runtime, model=model, **options)
    name = output_of(GGUF_NAME) if runtime == "llama.cpp" else _onnx_product(model)
    if result.status != "ok" or name not in result.taps:  # asked for other values, by the bisect
        return result
    return replace(result, taps={**result.taps, name: result.taps[name] * np.float32(1.001)})


def _onnx_product(graph: Path) -> str:
    import onnx

    nodes = onnx.load(graph, load_external_data=False).graph.node
    return next(node.output[0] for node in nodes if f"{MODULE}.codes" in node.input)


def llama_off_by_one(runtime: Any, ids: np.ndarray) -> np.ndarray:
    """Every step sees a cache that ends one token too early."""
    rows = []
    for at in range(len(ids)):
        runtime._context.clear()
        if at > 1:
            runtime._context.run(ids[: at - 1], 0)
        rows.append(runtime._context.run(ids[at : at + 1], max(at - 1, 0)))
    return np.concatenate(rows)


def onnx_off_by_one(runtime: Any, ids: np.ndarray) -> np.ndarray:
    """Every step sees a cache that ends one token too early."""
    cache, rows = runtime._empty(), []
    for at in range(len(ids)):
        short = {name: runtime._value(value.numpy()[:, :, : max(at - 1, 0)].copy()) for name, value in cache.items()}
        row, _ = runtime._run(ids[at : at + 1], max(at - 1, 0), short)
        _, cache = runtime._run(ids[at : at + 1], at, cache)
        rows.append(row)
    return np.concatenate(rows)


def prepare(runtime: str) -> None:
    """In the runner's process: a KV cache that is off by one while decoding."""
    if runtime == "llama.cpp":
        from qalora_runtimes.llama_cpp.wheel import CApiRuntime

        CApiRuntime.decode = llama_off_by_one  # type: ignore[method-assign]
    else:
        from qalora_runtimes.onnxruntime_.decoder import Decoder

        Decoder.decode = onnx_off_by_one  # type: ignore[method-assign]
