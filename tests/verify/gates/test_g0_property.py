"""One random thing of an artifact is changed, whatever it is: G0 must find it, and find it again without its bytes.

A few cases run with the suite; QALORA_TAMPERINGS=3000 runs as many of each format.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf.message import Message

from qalora_export.errors import QaloraError
from qalora_export.formats.gguf.validate import ARRAY, SCALARS, STRING, Field
from tests.verify.exports import Exported, copy_of
from tests.verify.tampering import (
    Fields,
    change_fields,
    change_graph,
    change_json,
    changed,
    fresh_once,
    g0,
    places,
    reseal,
)

COUNT = int(os.environ.get("QALORA_TAMPERINGS", "8"))
SILENT = "other_bytes"  # the check that hashes, which sees everything and explains nothing
NUMBERS = tuple(kind for kind in SCALARS if kind != 7)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh_once(monkeypatch)


def other(value: Any, rng: random.Random) -> Any:
    """A value of the same kind that is not this one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + rng.choice([-1, 1, 7]) if value > 1 else value + 1
    if isinstance(value, float):
        return value * 1.5 + 0.25
    if isinstance(value, str):
        return value + "x" if not value or rng.random() < 0.5 else value[:-1] + chr(ord(value[-1]) ^ 1)
    return value + b"x" if isinstance(value, bytes) else "x"


def one_field(fields: Fields, rng: random.Random) -> str:
    """Change, remove, add, retype or rename one metadata entry."""
    key = rng.choice([key for key in fields if key not in ("general.architecture", "general.name", "qalora.version")])
    how = rng.choice(["value"] * 6 + ["gone", "more", "type", "name"])
    if how == "value":
        fields[key] = other_field(fields[key], rng)
    elif how == "gone":
        del fields[key]
    elif how == "more":
        fields[f"{key}.{rng.randrange(99)}"] = fields[key]
    elif how == "name":
        fields[key + "s"] = fields.pop(key)
    else:
        kinds = [kind for kind in NUMBERS if kind != fields[key].kind]
        fields[key] = Field(kind := rng.choice(kinds), None, np.ones(1, SCALARS[kind]))
    return f"{key}: {how}"


def other_field(field: Field, rng: random.Random) -> Field:
    if field.kind == STRING:
        return Field(STRING, None, other(field.stored, rng))
    if field.kind != ARRAY:
        return Field(field.kind, None, np.array([other_number(field.stored[0])], field.stored.dtype))
    index = rng.randrange(len(field.stored))
    if rng.random() < 0.2:  # one item less
        texts = field.item == STRING
        rest = field.stored[:index] + field.stored[index + 1 :] if texts else np.delete(field.stored, index)
        return Field(field.kind, field.item, rest)
    item = field.stored[index]
    return changed(field, index, other(item, rng) if field.item == STRING else other_number(item))


def other_number(value: Any) -> Any:
    """The next one of its dtype; a boolean's opposite."""
    if value.dtype == np.uint8:
        return value ^ 1
    return np.nextafter(value, value.dtype.type(1e9)) if value.dtype.kind == "f" else value + value.dtype.type(1)


def messages(message: Message) -> Iterator[Message]:
    """A message and all messages inside it."""
    yield message
    for kind, value in message.ListFields():
        if kind.type == kind.TYPE_MESSAGE:
            for inner in value if hasattr(value, "add") else [value]:
                yield from messages(inner)


def one_of_the_graph(model: onnx.ModelProto, rng: random.Random) -> str:
    """Change, remove or repeat one field of one message anywhere in the graph."""
    while True:
        message = rng.choice(list(messages(model)))
        fields = [(kind, value) for kind, value in message.ListFields() if kind.name not in ("doc_string", "checksum")]
        if not fields:
            continue
        kind, value = rng.choice(fields)
        title = f"{message.DESCRIPTOR.name}.{kind.name} of {str(getattr(message, 'name', ''))[:50]}"
        if hasattr(value, "add"):  # messages
            index = rng.randrange(len(value))
            if rng.random() < 0.5:
                del value[index]
                return f"{title}: without {index}"
            value.add().CopyFrom(value[index])
            return f"{title}: {index} twice"
        if kind.type == kind.TYPE_MESSAGE:
            continue
        if hasattr(value, "append"):
            index = rng.randrange(len(value))
            value[index] = other(value[index], rng)
            return f"{title}: item {index}"
        if rng.random() < 0.2 and not kind.is_required:
            message.ClearField(kind.name)
            return f"{title}: gone"
        if kind.type == kind.TYPE_ENUM:
            value = rng.choice([number for number in kind.enum_type.values_by_number if number != value])
        else:
            value = other(value, rng)
        setattr(message, kind.name, value)
        return f"{title}: other"


def one_of_json(content: Any, rng: random.Random) -> str:
    holder, key = rng.choice(list(places(content)))
    how = rng.choice(["value", "value", "gone", "more"])
    if how == "gone":
        del holder[key]
    elif how == "more" and isinstance(holder, dict):
        holder[f"{key}_"] = holder[key]
    elif isinstance(holder[key], dict | list):
        holder[key] = None
    else:
        holder[key] = other(holder[key], rng)
    return f"{how} {key}"


def one_byte(path: Path, rng: random.Random) -> str:
    raw = bytearray(path.read_bytes())
    at = rng.randrange(len(raw))
    raw[at] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(raw))
    return f"{path.name}: a bit of byte {at}"


def one_file(folder: Path, rng: random.Random) -> str:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in ("manifest.json", "model.onnx"))
    path = rng.choice(files)
    if rng.random() < 0.5:
        path.unlink()
        return f"{path.name}: gone"
    shutil.copyfile(path, path.with_name(f"{path.stem}_2{path.suffix}"))
    return f"{path.name}: twice"


def tampered(kind: str, copy: Exported, rng: random.Random) -> tuple[str, bool]:
    """Change one thing; what it was, and whether it has a meaning of its own (else it is a byte)."""
    said: list[str] = []
    if kind == "gguf":
        if rng.random() < 0.15:
            return one_byte(copy.gguf, rng), False
        change_fields(copy.gguf, lambda fields: said.append(one_field(fields, rng)))
        return said[0], True
    how = rng.choice(["graph"] * 6 + ["json"] * 4 + ["file", "byte"])
    if how == "graph":
        change_graph(copy.onnx, lambda model: said.append(one_of_the_graph(model, rng)))
    elif how == "json":
        path = rng.choice(sorted(p for p in copy.onnx.glob("*.json") if p.name != "manifest.json"))
        change_json(path, lambda content: said.append(f"{path.name}: {one_of_json(content, rng)}"))
    elif how == "file":
        said.append(one_file(copy.onnx, rng))
    else:
        files = sorted(p for p in copy.onnx.rglob("*") if p.is_file() and p.name != "manifest.json")
        return one_byte(rng.choice(files), rng), False
    return said[0], True


def red(runtime: str, copy: Exported) -> Callable[[bool], bool]:
    """Whether G0 finds anything, with or without the check that only hashes. A refusal to read is a finding."""
    try:
        entry = g0(runtime, copy)
    except QaloraError:
        return lambda meaning: True
    failed = {check.figure for check in entry.checks if not check.passed}
    return lambda meaning: bool(failed - {SILENT} if meaning else failed)


@pytest.mark.parametrize(("kind", "runtime"), [("gguf", "llama.cpp"), ("onnx", "onnxruntime-genai")])
def test_one_random_change_is_found(kind: str, runtime: str, exported: Exported, tmp_path: Path) -> None:
    missed = []
    for seed in range(COUNT):
        folder = tmp_path / str(seed)
        folder.mkdir()
        copy = copy_of(exported, folder)
        what, meaning = tampered(kind, copy, random.Random(seed))
        if (copy.onnx / "onnx" / "model.onnx").exists():
            reseal(copy)
        if not red(runtime, copy)(meaning):
            missed.append(f"{seed}: {what}")
        shutil.rmtree(folder)
    assert not missed
