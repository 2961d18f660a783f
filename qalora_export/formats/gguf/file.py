"""A checked GGUF file as Python sees it: metadata by key, tensors as rows of bytes that stay in the file.

The reader of gates and inspection. It shares no code with the writer, which is the gguf package's, and tests hold it
against gguf.GGUFReader, value by value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import UnsafeInputError
from qalora_export.formats.gguf.types import PLAIN_TYPES
from qalora_export.formats.gguf.validate import Field, TensorInfo, read_header


class GgufFile:
    """fields: metadata as stored. metadata: the same as Python values. tensors: name -> StoredTensor, in file order.

    Raises InputError when the file is missing, UnsafeInputError when its header lies.
    """

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        self.path, self.fields = path, header.fields
        self.metadata: Mapping[str, Any] = _Values(header.fields)
        data = np.memmap(path, np.uint8, mode="r").view(np.ndarray)  # a plain view: slices of memmap are slow to make
        self.tensors = {info.name: StoredTensor(info, data) for info in header.tensors}


class StoredTensor:
    """One tensor: its info, and the mapped bytes of the whole file."""

    __slots__ = ("data", "info")

    def __init__(self, info: TensorInfo, data: NDArray[np.uint8]) -> None:
        self.info, self.data = info, data

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements, row-major."""
        return self.info.shape

    @property
    def kind(self) -> str:
        """ggml's name of the type."""
        from gguf import GGMLQuantizationType

        return GGMLQuantizationType(self.info.type).name

    @property
    def rows(self) -> NDArray[np.uint8]:
        """Its bytes (…, bytes per row), mapped."""
        info = self.info
        return self.data[info.begin : info.begin + info.nbytes].reshape(*info.shape[:-1], -1)

    @property
    def values(self) -> NDArray[Any]:
        """A tensor without blocks in its dtype, mapped. Raises UnsafeInputError for any other."""
        if self.kind not in PLAIN_TYPES:
            raise UnsafeInputError(f"expected plain numbers, found {self.kind}", where=self.info.name)
        return self.rows.view(PLAIN_TYPES[self.kind].dtype)

    def dequantized(self) -> NDArray[np.float32]:
        """float32 values by gguf.quants.dequantize, llama.cpp's own. Raises NotImplementedError for types it lacks."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        values = dequantize(self.rows, GGMLQuantizationType(self.info.type))
        return np.ascontiguousarray(values, np.float32).reshape(self.shape)


class _Values(Mapping[str, Any]):
    """Metadata as Python values, made when asked for: a list of numbers takes many times its bytes in the file."""

    def __init__(self, fields: Mapping[str, Field]) -> None:
        self._fields = fields

    def __getitem__(self, key: str) -> Any:
        return self._fields[key].value

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)
