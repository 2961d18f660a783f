"""Ways to change what an artifact says and make its manifest agree: what must be found is the change, not a hash."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.manifest import sidecar_path
from qalora_export.checkpoint.provenance import artifact_links
from qalora_export.formats.gguf.validate import ARRAY, SCALARS, STRING, Field, TensorInfo, read_header
from qalora_export.formats.onnx import account as onnx_account
from qalora_export.formats.onnx.layout import GRAPH
from qalora_export.safety import sha256_file
from qalora_export.verify.gates.g0_bytes import bytes_entry
from qalora_export.verify.rule import Entry
from qalora_export.verify.runtimes.record import all_runtimes
from tests.verify.exports import Exported

Fields = dict[str, Field]
U32, F32, STR = 4, 6, STRING


def g0(runtime: str, exported: Exported) -> Entry:
    """Gate G0 alone."""
    record, checkpoint = all_runtimes()[runtime], CanonicalCheckpoint(exported.checkpoint)
    artifact = exported.gguf if record.format == "gguf" else exported.onnx
    frequencies = LlamaRotaryEmbedding(AutoConfig.from_pretrained(exported.checkpoint)).inv_freq.numpy()
    contents, links = record.read_back(artifact), artifact_links(artifact, checkpoint.path)
    expected, found = record.expected(checkpoint, frequencies), record.found(artifact, contents)
    account = record.account(checkpoint, artifact, contents, sha256_file)
    return bytes_entry(runtime, checkpoint, contents, expected=expected, found=found, links=links, account=account)


def fresh_once(monkeypatch: Any) -> None:
    """The fresh export of a checkpoint, which hundreds of changed folders are held against, is made once."""
    make = cache(lambda path, level: _make(CanonicalCheckpoint(path), onnx_account.OnnxSettings(accuracy_level=level)))
    _make = onnx_account._fresh

    def fresh(checkpoint: CanonicalCheckpoint, settings: Any) -> Any:
        made = make(checkpoint.path, settings.accuracy_level)
        graph = onnx.ModelProto()
        graph.CopyFrom(made.graph)
        return replace(made, graph=graph, files=dict(made.files), hashed=lambda: made.tensors)

    monkeypatch.setattr(onnx_account, "_fresh", fresh)


def reseal(exported: Exported) -> None:
    """Both manifests name the files as they are now, new ones too."""
    for manifest, folder in ((sidecar_path(exported.gguf), None), (exported.onnx / "manifest.json", exported.onnx)):
        content = json.loads(manifest.read_text())
        names = list(content["files"])
        if folder is not None:
            names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p != manifest]
        paths = {name: manifest.parent / name for name in names}
        content["files"] = {n: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for n, p in paths.items()}
        manifest.write_text(json.dumps(content))


def change_fields(gguf: Path, change: Callable[[Fields], None]) -> None:
    """Rewrite the metadata of a GGUF file; its tensors stay as they are, byte for byte."""
    header, raw = read_header(gguf), gguf.read_bytes()
    change(header.fields)
    end = max(tensor.begin + tensor.nbytes for tensor in header.tensors)
    data = raw[header.tensors[0].begin : end + -end % 32]
    gguf.write_bytes(_header(header.fields, header.tensors) + data)


def _header(fields: Fields, tensors: list[TensorInfo]) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(fields))]
    for key, field in fields.items():
        parts += [_text(key), struct.pack("<I", field.kind)]
        if field.kind == ARRAY:
            parts.append(struct.pack("<IQ", field.item, len(field.stored)))
        if isinstance(field.stored, np.ndarray):
            parts.append(field.stored.tobytes())
        else:
            parts += [_text(text) for text in ([field.stored] if isinstance(field.stored, str) else field.stored)]
    for tensor in tensors:
        dims = tensor.shape[::-1]
        offset = tensor.begin - tensors[0].begin
        parts += [_text(tensor.name), struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.type, offset)]
    raw = b"".join(parts)
    return raw + b"\0" * (-len(raw) % 32)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def scalar(kind: int, value: Any) -> Field:
    """A metadata value of one of gguf's types."""
    return Field(kind, None, value if kind == STRING else np.array([value], SCALARS[kind]))


def changed(field: Field, index: int, value: Any) -> Field:
    """A list with one item changed."""
    stored = field.stored.copy()
    stored[index] = value
    return Field(field.kind, field.item, stored)


def change_graph(folder: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(folder / GRAPH, load_external_data=False)
    change(model)
    (folder / GRAPH).write_bytes(model.SerializeToString())


def change_json(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def places(content: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value in parsed JSON."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield content, key
        if isinstance(value, dict | list):
            yield from places(value)
