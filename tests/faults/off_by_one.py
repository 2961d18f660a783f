"""A KV cache that is off by one, planted in the process of a runner; it imports nothing that a runner has not."""

from __future__ import annotations

from typing import Any

import numpy as np


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
        CApiRuntime.decode_steps = lambda *_: None  # type: ignore[method-assign]  # the exact path's, side by side
    else:
        from qalora_runtimes.onnxruntime_.decoder import Decoder

        Decoder.decode = onnx_off_by_one  # type: ignore[method-assign]
        Decoder.decode_steps = lambda *_: None  # type: ignore[method-assign]
