"""`export patch`: what one fine-tune's artifact differs in from another's of the same base (qalora_runtimes.patches).

Training moves offsets, and scales where it was told to, so two merges of one base have the same codes in the same
places of the file. That is checked, tensor by tensor; what else may differ is what names an artifact: metadata,
manifests, the graph where an offset changed its type.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

from qalora_runtimes.patches import LORA, MANIFEST, TABLE, PatchedFile, Table, beside

from qalora_export.checkpoint.output import claim_output
from qalora_export.errors import InputError
from qalora_export.formats.gguf.file import GgufFile
from qalora_export.formats.onnx.layout import DATA, FLAT_DATA, GRAPH, graph_name, is_onnx_folder
from qalora_export.formats.patch.gguf import gguf_segments
from qalora_export.formats.patch.onnx import onnx_segments
from qalora_export.formats.patch.writer import PatchWriter, plain
from qalora_export.safety import StrPath, atomic_file, local_path


@dataclass(frozen=True)
class PatchReport:
    """out: the patch. nbytes: its size; of: that of the artifact. moved: offsets, and scales where they were
    trained, that differ, of how many stored.
    """

    out: Path
    nbytes: int
    of: int
    moved: int
    offsets: int


def export_patch(old: StrPath, new: StrPath, out: StrPath, *, force: bool = False) -> PatchReport:
    """Write what turns the artifact `old` into `new`, and back: two GGUF files or ONNX folders of merges of one base.

    Of layout split the adapters beside the files are patched with them.

    `qalora-export apply` and, on a device, `python -m qalora_runtimes apply` put it into a file or folder in place.
    Raises InputError where anything but offsets, scales and names differs, UnsafeInputError for unreadable files.
    """
    old, new, out = local_path(old), local_path(new), local_path(out)
    for path in (old, new):
        _require_artifact(path)
    if old.is_dir() != new.is_dir():
        raise InputError("a file and a folder are no two artifacts of one kind", where=f"{old}, {new}")
    with claim_output(out, force=force, inputs=(old, new)), atomic_file(out, force=force) as temporary:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            writer = PatchWriter(archive)
            table = (_folders if old.is_dir() else _gguf)(old, new, writer)
            archive.writestr(zipfile.ZipInfo(TABLE), json.dumps(table.as_json()).encode())
        nbytes = temporary.stat().st_size
    parts = [new, *([beside(new, LORA)] if _is_split(new) else [])] if new.is_file() else new.rglob("*")
    whole = sum(file.stat().st_size for file in parts if file.is_file())
    return PatchReport(out, nbytes, whole, writer.moved, writer.offsets)


def _require_artifact(path: Path) -> None:
    if not path.exists():
        raise InputError("there is no artifact", where=path, fix="name a GGUF file or an ONNX folder")
    if path.is_dir() and not is_onnx_folder(path):
        model = any(path.glob("*.safetensors"))
        raise InputError(
            "a checkpoint is not what devices have" if model else "this folder is no exported model",
            where=path,
            why="a patch is made between two exported models: GGUF files, or ONNX folders with onnx/model.onnx",
            fix="export both merges with `qalora-export export gguf` or `export onnx`, and name what that wrote",
        )


def _is_split(file: Path) -> bool:
    return GgufFile(file).metadata.get("qalora.layout") == "split"


def _gguf(old: Path, new: Path, writer: PatchWriter) -> Table:
    names = {"old": old.name, "new": new.name}
    files, same = [], {}
    for path in ("", *([LORA] if _is_split(old) or _is_split(new) else []), MANIFEST):
        a, b = beside(old, path), beside(new, path)
        if not a.is_file() and not b.is_file():
            continue
        if a.is_file() and b.is_file() and writer.hashed(a) == writer.hashed(b):
            same[path] = writer.hashed(a)
            continue
        tensors = path != MANIFEST and a.is_file() and b.is_file()
        segments = gguf_segments(a, b, writer) if tensors else plain(a, b, writer)
        there = [side if side.is_file() else None for side in (a, b)]
        files.append(writer.file(path, there[0], there[1], segments))
    _require_difference(files, old, new)
    return Table("file", names, tuple(files), same)


def _folders(old: Path, new: Path, writer: PatchWriter) -> Table:
    listed = [
        {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()} for root in (old, new)
    ]
    if graph_name(old) != graph_name(new):
        raise InputError("the two folders are laid out differently", where=f"{old}, {new}", fix="export both anew")
    data = DATA if graph_name(old) == GRAPH else FLAT_DATA
    files, same = list[PatchedFile](), dict[str, str]()
    for name in sorted({*listed[0], *listed[1]}):
        a, b = (side.get(name) for side in listed)
        if a is not None and b is not None and writer.hashed(a) == writer.hashed(b):
            same[name] = writer.hashed(a)
            continue
        is_data = name == data and a is not None and b is not None
        segments = onnx_segments(old, new, name, writer) if is_data else plain(old / name, new / name, writer)
        files.append(writer.file(name, a, b, segments))
    _require_difference(files, old, new)
    return Table("folder", {"old": old.name, "new": new.name}, tuple(files), same)


def _require_difference(files: list[PatchedFile], old: Path, new: Path) -> None:
    if not files:
        raise InputError("the two artifacts are equal", where=f"{old}, {new}", fix="there is nothing to patch")
