"""model.onnx.data: tensors one after another, each on a page boundary, never more than one in memory."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import InputError
from qalora_export.safety import sha256_bytes

if TYPE_CHECKING:
    import onnx_ir as ir

DATA_FILE = "model.onnx.data"
ALIGNMENT = 4096  # so that a runtime can map each tensor (onnx.proto: external_data "offset" SHOULD be page aligned)
CHUNK = 1 << 24


class DataFile:
    """Appends tensors to DATA_FILE inside `folder`; `hashes` collects manifest entries (dtype, shape, sha256)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = (folder / DATA_FILE).open("wb")
        self.hashes: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> DataFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, name: str, array: NDArray) -> ir.ExternalTensor:
        """Write the bytes of `array` (C order, little-endian) and return the reference to them."""
        import onnx_ir as ir

        if name in self.hashes:
            raise InputError("tensor written twice", where=name)
        array = np.ascontiguousarray(array)
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        raw = array.reshape(-1).view(np.uint8)
        for start in range(0, raw.size, CHUNK):  # a mapped tensor is never copied whole
            self._file.write(raw[start : start + CHUNK].data)
        self.hashes[name] = {"dtype": array.dtype.name, "shape": list(array.shape), "sha256": sha256_bytes(array)}
        return ir.ExternalTensor(
            DATA_FILE, offset, array.nbytes, ir.DataType.from_numpy(array.dtype), shape=ir.Shape(array.shape),
            name=name, base_dir=str(self._folder),
        )  # fmt: skip
