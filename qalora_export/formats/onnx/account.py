"""Every node, attribute, edge, tensor, key and file of an ONNX folder against a fresh export, made in memory."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.differences import differences
from qalora_export.checkpoint.generation import GENERATION
from qalora_export.checkpoint.manifest import MANIFEST, made_with
from qalora_export.errors import QaloraError
from qalora_export.formats.account import Account, other_tools
from qalora_export.formats.onnx.datafile import DataFile
from qalora_export.formats.onnx.export import make_folder, onnx_tools
from qalora_export.formats.onnx.genai_text.files import MODULE, OWN
from qalora_export.formats.onnx.graph_differences import graph_differences, size_of
from qalora_export.formats.onnx.hosts import CONFIG
from qalora_export.formats.onnx.layout import DATA, FLAT_DATA, FLAT_GRAPH, GENAI_CONFIG, GRAPH, graph_name
from qalora_export.formats.onnx.read import OnnxContents
from qalora_export.formats.streaming import HashSink
from qalora_export.recipe import OnnxSettings
from qalora_export.safety import HashFile, inside, read_json, sha256_bytes, sha256_file
from qalora_export.safety.limits import parse_json

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

# Notes for people; no host opens them.
NOTES = {"README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.txt", ".gitattributes", ".gitignore"}
LEVELS = (1, 4)
CHUNK = 1 << 22
# Tables of rotary angles are made by this machine's float32 sines: p radians are right to p·2^-24 (row p: at most p).
TABLE_ERROR, TABLE_ERROR_PER_ROW = 1e-6, 2.0**-21


def account_onnx(
    checkpoint: CanonicalCheckpoint, contents: OnnxContents, *, hash_of: HashFile = sha256_file
) -> Account:
    """contents: the folder by the independent reader. Values of weights are compared elsewhere as well, one by one.

    Raises InputError for a checkpoint that cannot be exported.
    """
    folder, graph = contents.folder, graph_name(contents.folder)
    level = contents.accuracy_level if contents.accuracy_level in LEVELS else LEVELS[-1]
    options: dict[str, Any] = {"accuracy_level": level}
    fresh = _fresh(checkpoint, OnnxSettings.model_validate({"accuracy_level": level}))
    if graph == FLAT_GRAPH:
        options["layout"] = "of earlier versions"
        fresh.flatten()
    data = FLAT_DATA if graph == FLAT_GRAPH else DATA
    harmless, entries = list[str](), len(fresh.files) + 2 + size_of(fresh.graph)
    found = list(_file_differences(folder, {*fresh.files, graph, data}, harmless))
    other = []
    for name, content in fresh.files.items():
        if (folder / name).is_file() and hash_of(inside(folder, name)) != sha256_bytes(content):
            other.append(name)
            found += _content_differences(inside(folder, name), content, name)
    same_data = (folder / data).is_file() and hash_of(inside(folder, data)) == fresh.data_sha256
    tensors = _Tensors(fresh, contents, same_data, harmless)
    made = made_with(folder / MANIFEST)
    others = other_tools(made, onnx_tools())
    lines = tuple(f"{graph}: {line}" for line in graph_differences(fresh.graph, contents.model, tensors=tensors))
    unproven = lines if made and others else ()  # those versions may well build another graph of the same function
    found += () if unproven else lines
    if sha256_bytes(fresh.graph.SerializeToString(deterministic=True)) != hash_of(inside(folder, graph)):
        other.append(graph)
    other += [] if same_data else [data]
    excuse = others or ("earlier versions wrote other bytes" if graph == FLAT_GRAPH else "")
    return Account(
        entries, tuple(found), options, tuple(harmless), tuple(other), excuse if other else "", unproven=unproven
    )


@dataclass
class _Fresh:
    """A folder that is not there. constants: large tensors that are no weights. hashed: makes `tensors`."""

    graph: onnx.ModelProto
    files: dict[str, bytes]
    constants: Mapping[str, NDArray[Any]]
    data_sha256: str
    hashed: Callable[[], Mapping[str, str]]

    @cached_property
    def tensors(self) -> Mapping[str, str]:
        """sha256 of every tensor in the data file, by name: made by one more export when data files differ."""
        return self.hashed()

    @cached_property
    def initializers(self) -> dict[str, onnx.TensorProto]:
        return {tensor.name: tensor for tensor in self.graph.graph.initializer}

    def flatten(self) -> None:
        """As folders of earlier versions lie: graph and data at the top, nothing for transformers.js, nor for
        GenAI's tokenizer."""
        for tensor in self.graph.graph.initializer:
            for entry in tensor.external_data:
                entry.value = FLAT_DATA if entry.key == "location" else entry.value
        for name in (CONFIG, GENERATION, MODULE, OWN):
            self.files.pop(name, None)
        genai = self.files[GENAI_CONFIG]
        self.files[GENAI_CONFIG] = genai.replace(f'"{GRAPH}"'.encode(), f'"{FLAT_GRAPH}"'.encode())


def _fresh(checkpoint: CanonicalCheckpoint, settings: OnnxSettings) -> _Fresh:
    sink = HashSink()
    with DataFile(checkpoint.path, sink) as data:
        made = make_folder(checkpoint, settings, data)
    hashed = functools.partial(_hashed_tensors, checkpoint, settings)
    return _Fresh(made.graph, made.files, made.constants, sink.hexdigest(), hashed)


def _hashed_tensors(checkpoint: CanonicalCheckpoint, settings: OnnxSettings) -> Mapping[str, str]:
    data = _TensorHashes(checkpoint.path, HashSink())
    with data:
        make_folder(checkpoint, settings, data)
    return data.digests


class _TensorHashes(DataFile):
    """digests: sha256 of every tensor by name."""

    def __init__(self, folder: Path, sink: HashSink) -> None:
        super().__init__(folder, sink)
        self.digests: dict[str, str] = {}

    def add(self, name: str, array: NDArray[Any]) -> ir.ExternalTensor:
        self.digests[name] = sha256_bytes(array)
        return super().add(name, array)


def _file_differences(folder: Path, expected: set[str], harmless: list[str]) -> Iterator[str]:
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    there = {path.relative_to(folder).as_posix() for path in found}
    for name in sorted(expected - there):
        yield f"{name}: missing"
    for name in sorted(there - expected - {MANIFEST}):
        if name in NOTES:
            harmless.append(f"{name}, a note for people")
        else:
            yield f"{name}: a file of no fresh export"


def _content_differences(path: Path, content: bytes, name: str) -> Iterator[str]:
    """JSON key by key, with the name that facts have; a file of anything else as a whole."""
    if path.suffix != ".json":
        yield f"{name}: other bytes than in the checkpoint"
        return
    try:
        found = read_json(path)
    except QaloraError as error:
        yield f"{name}: {error.what}"
        return
    yield from differences(parse_json(content, where=name), found, f"{name}: ")


@dataclass(frozen=True)
class _Tensors:
    """graph_differences' question about an initializer that both graphs have."""

    fresh: _Fresh
    contents: OnnxContents
    same_data: bool
    harmless: list[str]

    def __call__(self, name: str) -> str | None:
        expected, found = self.fresh.initializers[name], self.contents.initializers[name]
        if found.raw_data and found.external_data:
            return "numbers both in the graph and outside: which of them count is each reader's own choice"
        if self.same_data and found.external_data and expected.external_data == found.external_data:
            return None
        wanted = self.fresh.tensors.get(name) or self._sha256(expected)
        digest = self._sha256(found)
        if digest == wanted or self._is_another_sine(name):
            return None
        return f"other numbers (sha256 {digest[:12]}, of a fresh export {wanted[:12]})"

    def _sha256(self, tensor: onnx.TensorProto) -> str:
        """Of its bytes, wherever they lie."""
        import onnx

        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return sha256_bytes(onnx.numpy_helper.to_array(tensor).tobytes())
        entries, digest = {entry.key: entry.value for entry in tensor.external_data}, hashlib.sha256()
        with inside(self.contents.data_folder, entries["location"]).open("rb") as file:
            file.seek(int(entries.get("offset", "0")))
            missing = int(entries["length"])
            while block := file.read(min(CHUNK, missing)):
                digest.update(block)
                missing -= len(block)
        return digest.hexdigest()

    def _is_another_sine(self, name: str) -> bool:
        """Whether a table of angles is as right as this machine's: not a weight, and float32 cannot tell."""
        table = self.fresh.constants.get(name)
        if table is None or table.dtype != np.float32 or table.ndim != 2:
            return False
        found = self.contents.tensor(name)
        if found.shape != table.shape or found.dtype != table.dtype:
            return False
        allowed = TABLE_ERROR + TABLE_ERROR_PER_ROW * np.arange(len(table))[:, None]
        right = bool((np.abs(found.astype(np.float64) - table) <= allowed).all())
        if right:
            self.harmless.append(f"{name}, within what float32 sines of two machines differ")
        return right
