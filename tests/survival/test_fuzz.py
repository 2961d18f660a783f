"""Readers on hostile files: one of our errors or an answer, never another exception, a hang or gigabytes."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qalora_runtimes.protocol import (
    ProtocolError,
    TextRequest,
    make_job,
    read_answers,
    read_job,
    write_answers,
    write_job,
)

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.manifest import read_manifest, verify_manifest
from qalora_export.checkpoint.model_folder import INDEX, ModelFolder
from qalora_export.checkpoint.safetensors_file import map_tensor, read_header
from qalora_export.data.calibration import _documents
from qalora_export.data.prompts import read_prompts
from qalora_export.data.records import read_records
from qalora_export.errors import QaloraError
from qalora_export.formats.gguf.read import read_back as read_gguf
from qalora_export.formats.onnx.read import read_back as read_onnx
from qalora_export.inspection.view import open_view
from qalora_export.pipeline import _read_state
from qalora_export.qalora.adapter_files import ModuleShape, read_adapter
from qalora_export.recipe import load_recipe
from tests.models import make_tiny_canonical
from tests.qalora.adapters import own_adapter
from tests.verify.exports import export_both

MEMORY = 1 << 30  # bytes a reader may take beyond what the process has; the largest valid file here has half a MB
SECONDS = 30  # for one read on a busy machine
HOSTILE = (
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**62,
    2**64,
    10**40,
    1e308,
    0.5,
    "",
    "x",
    "../x",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    [],
    {},
    [[]],
    [0],
    [2**62, 2**62],
    {"a": 1},
    {"dtype": "F16"},
)
SIZES = (0, 1, 7, 2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1)
RECIPE = """
model = "model"
out = "out"
[quantize]
bits = 4
rules = [{match = "*.up_proj", bits = 3}]
[train]
rank = 8
targets = ["*"]
learning_rate = 1e-3
[export.gguf]
layout = "q4_1"
[verify]
runtimes = ["llama.cpp"]
"""
LINES = (
    '{"messages": [{"role": "user", "content": "on"}, {"role": "assistant", "content": "done"}]}\n'
    '{"messages": [{"role": "user", "content": "off"}, {"role": "assistant", "content": "é 東"}]}\n'
)


def _first_matrices(contents: Any) -> None:
    for module in list(contents.modules)[:2]:
        contents.group_affine(module)
    for name in list(contents.others)[:2]:
        contents.tensor(name)


def _canonical(folder: Path) -> None:
    checkpoint = CanonicalCheckpoint(folder)
    for module in list(checkpoint.modules)[:2]:
        checkpoint.group_affine(module)
    checkpoint.plain_names()


def _tensors(path: Path) -> None:
    for entry in read_header(path).values():
        map_tensor(path, entry)


def _manifest(folder: Path) -> None:
    read_manifest(folder)
    verify_manifest(folder)
    open_view(folder)


class _Letters:
    """A tokenizer of characters; the data reader does not depend on which one it is."""

    chat_template = None

    def __call__(self, text: str, **_: object) -> Any:
        return type("Encoded", (), {"input_ids": list(text.encode("utf-8", "replace"))})


SHAPES = {
    f"model.layers.{i}.{part}": ModuleShape(rows, columns, 32)
    for i in range(2)
    for part, rows, columns in (
        ("self_attn.q_proj", 128, 128),
        ("self_attn.k_proj", 64, 128),
        ("self_attn.v_proj", 64, 128),
        ("self_attn.o_proj", 128, 128),
        ("mlp.gate_proj", 256, 128),
        ("mlp.up_proj", 256, 128),
        ("mlp.down_proj", 128, 256),
    )
}


@dataclass(frozen=True)
class Reader:
    """file: the one that is damaged, below the folder of good files. read: gets what `at` names below that folder."""

    file: str
    at: str
    read: Callable[[Path], object]


BYTES = {
    "safetensors": Reader("base.qalora/model.safetensors", "base.qalora/model.safetensors", _tensors),
    "canonical weights": Reader("base.qalora/model.safetensors", "base.qalora", _canonical),
    "canonical config": Reader("base.qalora/config.json", "base.qalora", _canonical),
    "manifest": Reader("base.qalora/manifest.json", "base.qalora", _manifest),
    "shard index": Reader(f"sharded/{INDEX}", "sharded", ModelFolder),
    "adapter weights": Reader("adapter/adapter_model.safetensors", "adapter", lambda p: read_adapter(p, SHAPES)),
    "adapter config": Reader("adapter/adapter_config.json", "adapter", lambda p: read_adapter(p, SHAPES)),
    "GGUF": Reader("model.gguf", "model.gguf", lambda p: _first_matrices(read_gguf(p))),
    "GGUF manifest": Reader("model.gguf.manifest.json", "model.gguf", open_view),
    "ONNX graph": Reader("onnx/model.onnx", "onnx", lambda p: _first_matrices(read_onnx(p))),
    "GenAI config": Reader("onnx/genai_config.json", "onnx", lambda p: _first_matrices(read_onnx(p))),
    "job": Reader("job.npz", "job.npz", read_job),
    "answers": Reader("answers.npz", "answers.npz", lambda p: read_answers(p, positions=5)),
    "recipe": Reader("recipe.toml", "recipe.toml", load_recipe),
    "chat data": Reader("data.jsonl", "data.jsonl", read_records),
    "prompts": Reader("data.jsonl", "data.jsonl", read_prompts),
    "calibration": Reader("text.jsonl", "text.jsonl", lambda p: list(_documents(p, _Letters()))),
    "run.json": Reader("run.json", "run.json", _read_state),
}
JSON = ("canonical config", "manifest", "shard index", "adapter config", "GGUF manifest", "GenAI config", "run.json")


@pytest.fixture(scope="module")
def good(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small valid file of every kind."""
    folder = tmp_path_factory.mktemp("good")
    make_tiny_canonical(folder / "base.qalora", tiny_model)
    own_adapter(folder / "base.qalora", folder / "adapter")
    (folder / "adapter/manifest.json").unlink()  # it would answer for every flipped byte
    export_both(folder / "base.qalora", folder)
    shutil.copytree(tiny_model, folder / "sharded")
    names = list(read_header(folder / "sharded/model.safetensors"))
    (folder / "sharded" / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    request = TextRequest(("a",), (({"role": "user", "content": "b"},),))
    write_job(folder / "job.npz", make_job([[1, 2], [3, 4, 5]], text=request))
    write_answers(folder / "answers.npz", np.zeros((5, 7), np.float32), {"texts": []})
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "data.jsonl").write_text(LINES, encoding="utf-8")
    (folder / "text.jsonl").write_text('{"text": "on and off"}\n{"text": "é"}\n', encoding="utf-8")
    (folder / "run.json").write_text('{"stages": {"train": {"key": "a", "output": null}}}')
    for reader in BYTES.values():
        reader.read(folder / reader.at)
    return folder


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """MemoryError for a reader that allocates what a file claims, TimeoutError for one that does not end."""

    def expired(*_: object) -> None:
        raise TimeoutError(f"no answer in {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    handler = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def read_damaged(good: Path, reader: Reader, raw: bytes) -> None:
    """Put `raw` in place of the good file, read, and put it back."""
    path = good / reader.file
    before = path.read_bytes()
    path.write_bytes(raw)
    try:
        with bounded():
            reader.read(good / reader.at)
    except (QaloraError, ProtocolError) as error:
        assert str(error)
    finally:
        path.write_bytes(before)


def spots(length: int) -> st.SearchStrategy[int]:
    """Positions in a file: headers stand at the beginning, or at the end of a zip."""
    near = min(length - 1, 3000)
    return st.one_of(st.integers(0, min(near, 64)), st.integers(0, near), st.integers(length - 1 - near, length - 1))


def damage(data: st.DataObject, raw: bytes) -> bytes:
    """One to four changes: a byte, a number of four or eight bytes, a deletion, an insertion, a truncation."""
    damaged = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        if not damaged:
            break
        at = data.draw(spots(len(damaged)))
        kind = data.draw(st.sampled_from(("byte", "byte", "u64", "u32", "delete", "insert", "cut")))
        if kind == "byte":
            damaged[at] = data.draw(st.integers(0, 255))
        elif kind in ("u64", "u32"):
            width = 8 if kind == "u64" else 4
            damaged[at : at + width] = (data.draw(st.sampled_from(SIZES)) % 2 ** (8 * width)).to_bytes(width, "little")
        elif kind == "delete":
            del damaged[at : at + data.draw(st.integers(1, 9))]
        elif kind == "insert":
            damaged[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        else:
            del damaged[at:]
    return bytes(damaged)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to every value inside parsed JSON, the first few of long lists and tables."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items)[:12]:
        yield from places(item, (*path, key))


def hostile(data: st.DataObject, value: Any) -> Any:
    """`value` with one part replaced, removed or renamed."""
    path = data.draw(st.sampled_from(list(places(value))))
    new = data.draw(st.sampled_from(HOSTILE))
    if not path:
        return new
    changed = copy.deepcopy(value)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    action = data.draw(st.sampled_from(("replace", "replace", "remove", "rename")))
    if action == "replace" or isinstance(parent, list):
        parent[path[-1]] = new
    else:
        old = parent.pop(path[-1])
        if action == "rename":
            parent[str(new)] = old
    return changed


EXAMPLES = os.environ.get("QALORA_FUZZ_EXAMPLES")  # a long run, with other examples than the suite's
fuzz = settings(
    max_examples=int(EXAMPLES or 80),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    derandomize=EXAMPLES is None,
)


@pytest.mark.parametrize("name", BYTES)
@fuzz
@given(data=st.data())
def test_damaged_bytes(good: Path, name: str, data: st.DataObject) -> None:
    reader = BYTES[name]
    read_damaged(good, reader, damage(data, (good / reader.file).read_bytes()))


@pytest.mark.parametrize("name", JSON)
@fuzz
@given(data=st.data())
def test_hostile_json(good: Path, name: str, data: st.DataObject) -> None:
    reader = BYTES[name]
    value = hostile(data, json.loads((good / reader.file).read_text(encoding="utf-8")))
    read_damaged(good, reader, json.dumps(value).encode())


@pytest.mark.parametrize("name", ["safetensors", "canonical weights", "adapter weights"])
@fuzz
@given(data=st.data())
def test_hostile_safetensors_headers(good: Path, name: str, data: st.DataObject) -> None:
    """Sizes, offsets, dtypes and names that disagree with the bytes."""
    reader = BYTES[name]
    raw = (good / reader.file).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.dumps(hostile(data, json.loads(raw[8 : 8 + length]))).encode()
    read_damaged(good, reader, len(header).to_bytes(8, "little") + header + raw[8 + length :])


@pytest.mark.parametrize("name", ["chat data", "prompts", "calibration"])
@fuzz
@given(data=st.data())
def test_hostile_lines(good: Path, name: str, data: st.DataObject) -> None:
    reader = BYTES[name]
    rows = [json.loads(line) for line in (good / reader.file).read_text(encoding="utf-8").splitlines()]
    rows[data.draw(st.integers(0, 1))] = hostile(data, rows[0])
    read_damaged(good, reader, "".join(json.dumps(row) + "\n" for row in rows).encode())


@fuzz
@given(data=st.data())
def test_hostile_recipes(good: Path, data: st.DataObject) -> None:
    """Any value under any key, as --set gives it."""
    keys = (
        "model",
        "train.rank",
        "train.targets",
        "train",
        "quantize.rules",
        "quantize.bits",
        "export.gguf.layout",
        "export.gguf",
        "verify.runtimes",
        "model.x.y",
        "nothing",
        "train.rank.deep",
    )
    overrides = {data.draw(st.sampled_from(keys)): data.draw(st.sampled_from(HOSTILE)) for _ in range(2)}
    try:
        with bounded():
            load_recipe(good / "recipe.toml", overrides)
    except QaloraError as error:
        assert str(error)


@fuzz
@given(data=st.data())
def test_hostile_graphs(good: Path, data: st.DataObject) -> None:
    """Shapes, types, places of external data and attributes of a parsed ONNX graph."""
    reader = BYTES["ONNX graph"]
    model = onnx.ModelProto.FromString((good / reader.file).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        tensor = data.draw(st.sampled_from(list(model.graph.initializer)))
        kind = data.draw(st.sampled_from(("dims", "type", "external", "name", "attribute", "drop")))
        if kind == "dims":
            tensor.dims[:] = data.draw(st.lists(st.sampled_from([-1, 0, 1, 32, 2**31, 2**62]), max_size=5))
        elif kind == "type":
            tensor.data_type = data.draw(st.integers(0, 40))
        elif kind == "external" and tensor.external_data:
            entry = data.draw(st.sampled_from(list(tensor.external_data)))
            entry.value = data.draw(st.sampled_from(["", "-1", "0", str(2**62), "1e9", "..", "../x", "/dev/zero", "."]))
        elif kind == "name":
            tensor.name = data.draw(st.sampled_from(["", "x", "model.layers.0.mlp.up_proj.codes"]))
        elif kind == "attribute":
            node = data.draw(st.sampled_from([n for n in model.graph.node if n.op_type == "MatMulNBits"]))
            data.draw(st.sampled_from(list(node.attribute))).i = data.draw(st.sampled_from([-1, 0, 1, 3, 2**31, 2**62]))
        elif kind == "drop":
            model.graph.initializer.remove(tensor)
    read_damaged(good, reader, model.SerializeToString())
