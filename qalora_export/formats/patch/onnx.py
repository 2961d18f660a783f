"""Two ONNX folders of one base: a delta of each tensor that holds offsets, or scales where they were trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from qalora_runtimes.patches import FLOAT, INT, Segment

from qalora_export.errors import InputError
from qalora_export.formats.patch.writer import PatchWriter, bytes_of, not_one_base, same
from qalora_export.progress import track

OFFSETS = (".remainder", ".zero_points", ".offset", ".scale")  # formats/onnx/read.py


def onnx_segments(old: Path, new: Path, name: str, writer: PatchWriter) -> Iterator[Segment]:
    """The data file, tensor by tensor in its order."""
    places = [_places(folder) for folder in (old, new)]
    if list(places[0]) != list(places[1]):
        raise InputError("the two graphs hold other tensors", where=f"{old}, {new}", why="they are not of one base")
    data, at = [bytes_of(folder / name) for folder in (old, new)], [0, 0]
    for tensor in track(list(places[0]), "export patch, tensors"):
        here = [side[tensor] for side in places]
        yield from writer.anything(*(d[i : p[0]] for d, i, p in zip(data, at, here, strict=True)))
        a, b = (d[begin : begin + size] for d, (begin, size, _) in zip(data, here, strict=True))
        if np.array_equal(a, b):
            yield from same(len(a))
        elif not tensor.endswith(OFFSETS):
            raise not_one_base(tensor, "it is no offset and no scale")
        elif here[0][1:] == here[1][1:]:
            width, kind = here[0][2]
            yield writer.delta(a, b, width, [(0, width, kind, 1)])
        else:  # float16 would round one of the two
            yield from writer.anything(a, b)
        at = [begin + size for begin, size, _ in here]
    yield from writer.anything(*(d[i:] for d, i in zip(data, at, strict=True)))


def _places(folder: Path) -> Mapping[str, tuple[int, int, tuple[int, str]]]:
    """Tensor -> (begin, bytes, (width, kind)) in the data file, in the order of the file."""
    import onnx

    from qalora_export.formats.onnx.validate import read_model

    found = []
    for tensor in read_model(folder).graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        said = {entry.key: entry.value for entry in tensor.external_data}
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        width, kind = (dtype.itemsize, FLOAT) if dtype in (np.float16, np.float32) else (1, INT)
        found.append((int(said.get("offset", "0")), int(said["length"]), tensor.name, (width, kind)))
    return {name: (begin, size, item) for begin, size, name, item in sorted(found)}
