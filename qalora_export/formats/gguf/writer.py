"""Stream a GGUF file: header and names first, then one tensor in memory at a time (gguf.GGUFWriter does the bytes)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qalora_export.console import track
from qalora_export.formats.gguf.blocks import BLOCK_FORMATS
from qalora_export.formats.gguf.metadata import Entry
from qalora_export.formats.gguf.plan import TensorPlan
from qalora_export.safety import sha256_bytes


def write_gguf(path: Path, arch: str, entries: list[Entry], plans: list[TensorPlan], *,
               description: str = "write GGUF") -> dict[str, dict[str, Any]]:  # fmt: skip
    """Write `path` and return, per tensor name, its GGUF dtype, shape and the sha256 of its bytes in the file.

    The caller passes a temporary path (safety.atomic_file): this function neither syncs nor renames.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, arch)
    try:
        for entry in entries:
            getattr(writer, f"add_{entry.kind}")(entry.key, entry.value)
        for plan in plans:
            block = BLOCK_FORMATS.get(plan.kind)
            rows = (plan.shape[0], plan.nbytes // plan.shape[0]) if block else plan.shape
            dtype = np.dtype(np.uint8) if block else np.dtype(np.float32)  # uint8 tells the writer: shape is in bytes
            writer.add_tensor_info(plan.name, rows, dtype, plan.nbytes, GGMLQuantizationType[plan.kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        tensors: dict[str, dict[str, Any]] = {}
        for plan in track(plans, description):
            array = np.ascontiguousarray(plan.load())
            array = array if array.dtype.kind == "f" else array.view(np.uint8)  # bfloat16 goes as its bytes
            writer.write_tensor_data(array)
            tensors[plan.name] = {"dtype": plan.kind, "shape": list(plan.shape), "sha256": sha256_bytes(array)}
        return tensors
    finally:
        writer.close()
