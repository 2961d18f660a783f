"""The same artifact with rounding-free kernels: accuracy_level = 1 (float32 accumulation), every byte of weight equal.

Two ways to run it:

* `exact_graph(folder)` is the graph alone, as bytes, for the data file where it lies. Give the bytes to ONNX Runtime's
  InferenceSession with the config entry "session.model_external_initializers_file_folder_path" set to the folder of the
  graph. Nothing is copied.
* `exact_variant(folder, target)` is a folder of its own for runners that take only a folder. The data file is copied
  (copy-on-write where the file system can): ONNX Runtime refuses a symbolic link that leaves the folder, and a hard
  link would make the shipped file itself fail our check for links.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from qalora_export.checkpoint.manifest import MANIFEST
from qalora_export.formats.onnx.layout import graph_name
from qalora_export.formats.onnx.tied_head import without_int8
from qalora_export.formats.onnx.validate import read_model
from qalora_export.safety import atomic_directory

if TYPE_CHECKING:
    import onnx

EXACT_LEVEL = 1
COPY_CHUNK = 1 << 30


def exact_graph(folder: Path) -> bytes:
    """The graph of `folder` with accuracy_level 1; its external data still refers to the data file beside it."""
    return bytes(with_accuracy_level(read_model(folder), EXACT_LEVEL).SerializeToString(deterministic=True))


def exact_variant(folder: Path, target: Path, *, force: bool = False) -> Path:
    """A complete folder at `target` (without a manifest: it is a test object, no artifact). Returns `target`."""
    name, graph = graph_name(folder), exact_graph(folder)
    with atomic_directory(target, force=force) as copy:
        (copy / name).parent.mkdir(exist_ok=True)
        for path in sorted({*folder.iterdir(), *(folder / name).parent.iterdir()}):
            if path.is_file() and path not in (folder / name, folder / MANIFEST):
                _copy(path, copy / path.relative_to(folder))
        (copy / name).write_bytes(graph)
    return target


def with_accuracy_level(model: onnx.ModelProto, level: int) -> onnx.ModelProto:
    """Set accuracy_level on every MatMulNBits node of `model`, in place, and return it.

    Without int8 an lm_head that reads the embedding's codes becomes a float32 product (tied_head.py): of the same
    numbers, and not a hundred times slower.
    """
    if level == EXACT_LEVEL:
        without_int8(model)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            set_attribute(node, "accuracy_level", level)
    return model


def set_attribute(node: onnx.NodeProto, name: str, value: int) -> None:
    """Replace or add one integer attribute."""
    import onnx

    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])


def _copy(source: Path, target: Path) -> None:
    if not hasattr(os, "copy_file_range"):  # Linux only; it shares blocks on Btrfs and XFS
        shutil.copyfile(source, target)
        return
    with source.open("rb") as reader, target.open("wb") as writer:
        try:
            while os.copy_file_range(reader.fileno(), writer.fileno(), COPY_CHUNK):
                pass
        except OSError:  # a file system without it: start over the plain way
            shutil.copyfile(source, target)
