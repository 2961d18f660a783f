"""Stream a GGUF file: header and names by gguf.GGUFWriter, then the tensors a block of rows at a time."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.formats.gguf.metadata import Entry
from qalora_export.formats.gguf.tensor_table import TensorPlan
from qalora_export.formats.gguf.types import BlockType
from qalora_export.formats.gguf.validate import ALIGNMENT
from qalora_export.formats.streaming import HashedFile, Sink, prepared, row_blocks
from qalora_export.progress import track


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """tensors: per name its GGUF dtype and shape. sha256: of the whole file."""

    tensors: dict[str, dict[str, Any]]
    sha256: str


def write_gguf(
    path: Path, arch: str, entries: list[Entry], plans: list[TensorPlan], *, description: str = "write GGUF"
) -> WrittenFile:
    """Write `path`. The caller passes a temporary one (safety.atomic_file), which gets its name when all is checked."""
    with HashedFile(path) as file:
        stream_gguf(file, header_of(arch, entries, plans), plans, description=description)
    tensors = {plan.name: {"dtype": plan.kind.name, "shape": list(plan.shape)} for plan in plans}
    return WrittenFile(tensors, file.sha256)


def stream_gguf(file: Sink, header: bytes, plans: list[TensorPlan], *, description: str = "") -> None:
    """The same into anything that takes bytes. header: of header_of. description: of a progress bar, if any."""
    file.write(header)
    _pad(file)
    blocks = prepared(_load, ((plan, rows) for plan in plans for rows in row_blocks(plan.shape[0], plan.nbytes)))
    for plan in track(plans, description) if description else plans:
        _write_tensor(file, plan, blocks)


def header_of(arch: str, entries: list[Entry], plans: list[TensorPlan]) -> bytes:
    """Everything before the padding in front of the first tensor, by gguf.GGUFWriter."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.gguf_writer import WriterState

    writer, memory = GGUFWriter(None, arch), io.BytesIO()
    for entry in entries:
        getattr(writer, f"add_{entry.kind}")(entry.key, entry.value)
    for plan in plans:
        block = issubclass(plan.kind, BlockType)
        rows = (plan.shape[0], plan.nbytes // plan.shape[0]) if block else plan.shape
        dtype = np.dtype(np.uint8) if block else np.dtype(np.float32)  # uint8 tells the writer: shape is in bytes
        writer.add_tensor_info(plan.name, rows, dtype, plan.nbytes, GGMLQuantizationType(plan.kind.id))
    writer.fout, writer.state = [memory], WriterState.EMPTY  # type: ignore[list-item]  # what opening a file sets
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return memory.getvalue()


def _load(job: tuple[TensorPlan, slice]) -> NDArray[np.uint8]:
    plan, rows = job
    return np.ascontiguousarray(plan.load(rows)).reshape(-1).view(np.uint8)


def _write_tensor(file: Sink, plan: TensorPlan, blocks: Iterator[NDArray[np.uint8]]) -> None:
    """Take the blocks of one tensor from the stream, write them, pad."""
    missing = plan.nbytes
    while missing > 0:
        block = next(blocks)
        file.write(block.data)
        missing -= block.nbytes
    _pad(file)


def _pad(file: Sink) -> None:
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
