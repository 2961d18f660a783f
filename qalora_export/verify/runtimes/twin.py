"""The F32 twin of a GGUF: the artifact's own bytes, dequantized, for kernels that do not round.

llama.cpp has no rounding-free kernel for quantized weights (activations become int8), so gate G2 runs a second file in
which every tensor is F32. It is made from the artifact, not from the checkpoint: metadata is copied and tensors are
dequantized by gguf's own code, so whatever is wrong in the artifact is wrong in the twin and shows in its logits.
The finished twin is read back and compared with the artifact again, so a fault of this module cannot hide either.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.errors import ParityError
from qalora_export.formats.gguf.file import GgufFile
from qalora_export.formats.gguf.types import F32
from qalora_export.formats.gguf.validate import Field
from qalora_export.grid import differing
from qalora_export.safety import atomic_file

ALL_F32 = 0  # LLAMA_FTYPE_ALL_F32
COPIED_BY_WRITER = {"general.architecture", "general.file_type"}


def write_twin(artifact: Path, out: Path, *, force: bool = False) -> int:
    """Write the twin and verify it. Returns the number of tensors.

    Raises ParityError when the twin read back is not the artifact's dequantized numbers, bit for bit.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    reader = GgufFile(artifact)
    with atomic_file(out, force=force) as temporary:
        writer = GGUFWriter(temporary, arch=str(reader.metadata.get("general.architecture", "")))
        for key, field in reader.fields.items():
            if key not in COPIED_BY_WRITER:
                _copy_field(writer, key, field)
        writer.add_file_type(ALL_F32)
        for name, tensor in reader.tensors.items():
            writer.add_tensor_info(
                name, tensor.shape, np.dtype(np.float32), F32.nbytes(tensor.shape), GGMLQuantizationType.F32
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, values in _dequantized(reader):
            writer.write_tensor_data(values)
        writer.close()
    return _verify(reader, out)


def _copy_field(writer: Any, key: str, field: Field) -> None:
    from gguf import GGUFValueType

    value = field.value
    if value == []:  # the writer refuses an empty list, and it says nothing
        return
    sub_type = None if field.item is None else GGUFValueType(field.item)
    writer.add_key_value(key, value, GGUFValueType(field.kind), sub_type=sub_type)


def _dequantized(reader: GgufFile) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """(GGUF tensor name, float32 array in numpy order), one tensor in memory at a time."""
    for name, tensor in reader.tensors.items():
        yield name, tensor.dequantized()


def _verify(artifact: GgufFile, out: Path) -> int:
    twin = GgufFile(out)
    count = 0
    for (name, values), (found, tensor) in zip(_dequantized(artifact), twin.tensors.items(), strict=True):
        wrong = differing(np.asarray(tensor.values), values)
        if found != name or wrong:
            raise ParityError(
                f"the F32 twin differs from the artifact in {wrong} values",
                where=f"{out}: {name}",
                why="the exact path would measure something else",
                fix="report this",
            )
        count += 1
    return count
