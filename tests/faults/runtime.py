"""A fault of a runtime itself, planted in the values that it gives; off_by_one.py plants in its process."""

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
