"""Canonical checkpoint -> ONNX folder: streamed, atomic, read back with the onnx package before it is committed."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.manifest import MANIFEST, intact_meanwhile, parent_of, write_manifest
from qalora_export.checkpoint.output import claim_output
from qalora_export.errors import ParityError
from qalora_export.formats.account import tools
from qalora_export.formats.contents import Comparison, FolderContents, compare
from qalora_export.formats.export_report import ExportReport
from qalora_export.formats.onnx.check import check_runnable
from qalora_export.formats.onnx.layout import DATA, GRAPH
from qalora_export.formats.onnx.read import EMBEDDINGS_KEY, MODULES_KEY, read_back
from qalora_export.formats.onnx.split_form import WrittenForm
from qalora_export.formats.onnx.tied_head import HEAD
from qalora_export.formats.streaming import synced
from qalora_export.grid import AFFINE16, NamedGrid
from qalora_export.models.families import family_of
from qalora_export.progress import track
from qalora_export.recipe import OnnxSettings
from qalora_export.safety import StrPath, atomic_directory, local_path
from qalora_export.version import __version__

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from qalora_export.formats.onnx.datafile import DataFile

PRODUCER = "qalora-export"


def export_onnx(
    checkpoint: StrPath, out: StrPath, settings: OnnxSettings | None = None, *, force: bool = False
) -> ExportReport:
    """Write the folder `out`, laid out as formats/onnx/layout.py says, and its manifest.json.

    One tensor is in memory at a time. The folder is read back before it gets its final name. Raises InputError for
    unsupported architectures and existing output, ParityError when a single value of the written file differs; in
    every case nothing is left behind.
    """
    checkpoint, out, settings = local_path(checkpoint), local_path(out), settings or OnnxSettings()
    with (
        claim_output(out, force=force, inputs=[checkpoint]),
        intact_meanwhile(checkpoint, "the checkpoint") as require_intact,
    ):
        return _export(checkpoint, out, settings, require_intact, force=force)


def _export(
    checkpoint: Path, out: Path, settings: OnnxSettings, require_intact: Callable[[], None], *, force: bool
) -> ExportReport:
    source = CanonicalCheckpoint(checkpoint)
    check_runnable(source.config, where=checkpoint)
    parents = [parent_of(checkpoint, "checkpoint")]
    with atomic_directory(out, force=force) as folder:
        written = _write(source, folder, settings)
        with synced([folder / DATA]):  # on its way to the disk while it is read back
            found = _checked(compare(FolderContents(source), read_back(folder), progress="read back"), out)
        require_intact()
        write_manifest(
            folder,
            "onnx",
            tensors=written.entries,
            parents=parents,
            settings=settings.model_dump(mode="json"),
            digests={DATA: written.sha256},
            made_with=onnx_tools(),
        )
    written_files = (path for path in out.rglob("*") if path.is_file())
    files = sorted(written_files, key=lambda path: (path.name == MANIFEST, path.relative_to(out).as_posix()))
    size = sum(path.stat().st_size for path in files)
    return ExportReport(tuple(files), written.types, size, found.values, found.total, written.notes)


@dataclass(frozen=True, slots=True)
class Written:
    """entries: those of the tensors in the manifest; sha256: of the data file; types, notes: for the report."""

    entries: dict[str, dict[str, Any]]
    sha256: str
    types: dict[str, int]
    notes: tuple[str, ...]


def _write(source: CanonicalCheckpoint, folder: Path, settings: OnnxSettings) -> Written:
    """Graph, data file and what hosts need beside them, into `folder`."""
    from qalora_export.formats.onnx.datafile import DataFile
    from qalora_export.formats.onnx.hosts import genai_notes

    with DataFile(folder) as data:
        made = make_folder(source, settings, data, description="export onnx")
    (folder / GRAPH).write_bytes(made.graph.SerializeToString(deterministic=True))
    for name, content in made.files.items():
        (folder / name).write_bytes(content)
    types = Counter(f"MatMulNBits, {form.container} bits" for form in made.forms.values())
    types.update(f"GatherBlockQuantized, {form.container} bits" for form in made.embeddings.values())
    types.update(data.entries[name]["dtype"] for name in made.carried if name in data.entries)
    bound = family_of(source.config).bound(source.config, "onnx")
    notes = (*_notes(made.forms), *([str(bound)] if bound else []), *genai_notes(source.path))
    return Written(data.entries, data.sha256, dict(types), notes)


@dataclass(frozen=True)
class Made:
    """A folder in memory. files: what hosts need beside the graph, by name. forms: of quantized modules; carried: names
    of other tensors of the checkpoint; embeddings: forms of those of them that stay in blocks; constants: large ones of
    the graph itself, as rotary tables.
    """

    graph: onnx.ModelProto
    files: dict[str, bytes]
    forms: dict[str, WrittenForm]
    carried: list[str]
    embeddings: dict[str, WrittenForm]
    constants: dict[str, NDArray[Any]]


def make_folder(source: CanonicalCheckpoint, settings: OnnxSettings, data: DataFile, *, description: str = "") -> Made:
    """Everything of the folder but the data file, whose bytes go into `data` one tensor after the other.

    description: of a progress bar, if any.
    """
    import onnx_ir as ir

    from qalora_export.formats.onnx.graph import build_graph
    from qalora_export.formats.onnx.hosts import host_files
    from qalora_export.formats.onnx.rewrite import Rewriter

    package = build_graph(source.config, untied_head=HEAD in source.modules)
    model = package["model"]
    with contextlib.closing(Rewriter(model, source, data, settings.accuracy_level)) as rewriter:
        for value in track(rewriter.weights(), description) if description else rewriter.weights():
            rewriter.place(value)
        rewriter.finish()
    model.producer_name, model.producer_version = PRODUCER, __version__
    modules = {name: (*entry, source.grids[name]) for name, entry in source.modules.items()}
    model.metadata_props[MODULES_KEY] = _declared(modules)
    if rewriter.embeddings:
        model.metadata_props[EMBEDDINGS_KEY] = _declared(
            {name: source.embeddings[name] for name in rewriter.embeddings}
        )
    graph = ir.serde.serialize_model(model)
    host = host_files(package, source)
    return Made(graph, host, rewriter.forms, rewriter.carried, rewriter.embeddings, rewriter.constants)


def _declared(matrices: Mapping[str, tuple[int, int, NamedGrid]]) -> str:
    """JSON: module -> [bits, group_size], and its grid where that is not the usual one."""
    entries = {
        m: [bits, group, *([] if grid is AFFINE16 else [grid.name])] for m, (bits, group, grid) in matrices.items()
    }
    return json.dumps(entries, separators=(",", ":"))


def onnx_tools() -> dict[str, str]:
    """Versions that the bytes of a folder follow from."""
    return tools("mobius-onnx", "onnx", "onnx-ir", "onnx-shape-inference", "onnxscript", "numpy", "protobuf")


def _notes(forms: dict[str, WrittenForm]) -> tuple[str, ...]:
    """What a user may want to know about how the tensors were written."""
    symmetric = sum(not form.remainder for form in forms.values())
    wide = sum(form.remainder == "float32" for form in forms.values())
    moved = sum(form.moved for form in forms.values())
    notes = [f"{symmetric} symmetric tensors need no offset branch"] if symmetric else []
    notes += [f"{wide} tensors keep offset remainders in float32, which float16 would round"] if wide else []
    notes += [f"{moved} groups use zero point 0 to keep the offset exact (more int8 noise)"] if moved else []
    return tuple(notes)


def _checked(found: Comparison, out_dir: Path) -> Comparison:
    if found.total:
        raise ParityError(
            f"{found.total} values differ when the folder is read back",
            where=out_dir,
            why=found.describe(),
            fix="this is a defect of the exporter: please report it; nothing was written",
        )
    return found
