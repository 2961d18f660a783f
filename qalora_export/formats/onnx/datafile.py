"""The data file of a graph: tensors one after another, each on a page boundary, never more than one in memory."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import InputError
from qalora_export.formats.onnx.layout import DATA
from qalora_export.formats.streaming import BLOCK_BYTES, HashedFile, Sink, release

if TYPE_CHECKING:
    import onnx_ir as ir

ALIGNMENT = 4096  # so that a runtime can map each tensor (onnx.proto: external_data "offset" SHOULD be page aligned)


class DataFile:
    """Appends tensors to layout.DATA inside `folder`; `entries`: those of their manifest (dtype, shape).

    sink: takes the bytes instead of that file, which then need not be there.
    """

    def __init__(self, folder: Path, sink: Sink | None = None) -> None:
        self._path, self._opened = folder / DATA, None
        if sink is None:
            self._path.parent.mkdir(exist_ok=True)
            sink = self._opened = HashedFile(self._path)
        self._file = sink
        self.entries: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> DataFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._opened is not None:
            self._opened.__exit__(kind, error, trace)

    @property
    def sha256(self) -> str:
        """Digest of the file, once it is closed; of a sink of somebody else's it is not known here."""
        return self._opened.sha256 if self._opened is not None else ""

    def add(self, name: str, array: NDArray[Any]) -> ir.ExternalTensor:
        """Write the bytes of `array` (C order, little-endian) and return the reference to them."""
        import onnx_ir as ir

        if name in self.entries:
            raise InputError("tensor written twice", where=name)
        array = np.ascontiguousarray(array)
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        raw = array.reshape(-1).view(np.uint8)
        for start in range(0, raw.size, BLOCK_BYTES):  # a mapped tensor is never in memory whole
            self._file.write(raw[start : start + BLOCK_BYTES].data)
            release(array)
        self.entries[name] = {"dtype": array.dtype.name, "shape": list(array.shape)}
        return ir.ExternalTensor(
            self._path.name,
            offset,
            array.nbytes,
            ir.DataType.from_numpy(array.dtype),
            shape=ir.Shape(array.shape),
            name=name,
            base_dir=str(self._path.parent),
        )
