"""Files cut off, flipped, absurd or reaching outside: one clear message, the right exit code, nothing half-written."""

from __future__ import annotations

import json
from collections.abc import Callable

import onnx
import pytest
from safetensors.numpy import load_file

from tests.models import make_tiny_canonical
from tests.survival.place import (
    BAD,
    BASE,
    EVALUATE,
    GGUF,
    MERGE,
    PARITY,
    QUANTIZE,
    REFUTED,
    TRAIN,
    UNSAFE,
    UP,
    VERIFY,
    WEIGHTS,
    Case,
    Place,
    flip,
    judge,
)


def cut(count: int) -> Callable[[bytes], bytes]:
    return lambda raw: raw[:-count]


def header_size(value: int) -> Callable[[bytes], bytes]:
    return lambda raw: value.to_bytes(8, "little") + raw[8:]


def header_text(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    """Replace inside the header of a safetensors file, whose length is kept."""

    def change(raw: bytes) -> bytes:
        assert raw.count(old) and len(old) == len(new)
        return raw.replace(old, new, 1)

    return change


def shard_index(place: Place, name: str) -> None:
    weight_map = dict.fromkeys(load_file(place / "model/model.safetensors"), name)
    place.write("model/model.safetensors.index.json", json.dumps({"weight_map": weight_map}))


def external(key: str, value: str) -> Callable[[Place], None]:
    def change(model: onnx.ModelProto) -> None:
        entries = next(t.external_data for t in model.graph.initializer if t.external_data)
        next(entry for entry in entries if entry.key == key).value = value

    return lambda place: place.edit_graph(change)


def absurd_shape(model: onnx.ModelProto) -> None:
    next(t for t in model.graph.initializer if t.external_data).dims[:] = [2**40, 2**40]


CASES = (
    # truncated, flipped, absurd: safetensors
    Case("truncated weights", QUANTIZE, UNSAFE, ("tensors end at", "truncated"), lambda p: p.edit(WEIGHTS, cut(100))),
    Case("header alone", QUANTIZE, UNSAFE, ("truncated",), lambda p: p.edit(WEIGHTS, lambda raw: raw[:6])),
    Case("empty weights", QUANTIZE, UNSAFE, ("truncated",), lambda p: p.edit(WEIGHTS, lambda raw: b"")),
    Case("header of 2^62 bytes", QUANTIZE, UNSAFE, (str(2**62),), lambda p: p.edit(WEIGHTS, header_size(2**62))),
    Case(
        "header is no JSON", QUANTIZE, UNSAFE, ("not a JSON object", "begin with"), lambda p: p.edit(WEIGHTS, flip(8))
    ),
    Case(
        "absurd shape",
        QUANTIZE,
        UNSAFE,
        ("disagrees with its shape",),
        lambda p: p.edit(WEIGHTS, header_text(b'"shape":[128]', b'"shape":[999]')),
    ),
    Case(
        "unknown dtype",
        QUANTIZE,
        UNSAFE,
        ("unknown dtype",),
        lambda p: p.edit(WEIGHTS, header_text(b'"F16"', b'"F99"')),
    ),
    Case(
        "a code flipped in the base",
        MERGE,
        BAD,
        ("differs from its manifest", "model.safetensors"),
        lambda p: p.edit(BASE, flip(-1, 1)),
    ),
    Case("truncated base", TRAIN, BAD, REFUTED, lambda p: p.edit(BASE, cut(10))),
    Case("truncated base to evaluate", EVALUATE, UNSAFE, ("truncated",), lambda p: p.edit(BASE, cut(10))),
    Case(
        "flipped adapter",
        MERGE,
        BAD,
        ("differ from their manifest",),
        lambda p: p.edit("adapter/adapter_model.safetensors", flip(-1)),
    ),
    Case(
        "manifest of something else",
        MERGE,
        UNSAFE,
        ("not one of ours",),
        lambda p: p.write("adapter/manifest.json", '{"format": "x"}'),
    ),
    Case(
        "group size of 2^62",
        GGUF,
        BAD,
        REFUTED,
        lambda p: p.edit_json(
            "base.qalora/config.json", lambda c: c["quantization_config"]["modules"][UP].update(group_size=2**62)
        ),
    ),
    Case(
        "another base",
        ("merge", "other.qalora", "adapter", "--out", "new"),
        BAD,
        ("another base",),
        lambda p: make_tiny_canonical(p / "other.qalora", p / "model", bits=3),
    ),
    # GGUF
    Case(
        "truncated GGUF",
        ("inspect", "model.gguf"),
        UNSAFE,
        ("ends at", "truncated"),
        lambda p: p.edit("model.gguf", cut(100)),
    ),
    Case(
        "truncated GGUF to verify",
        (*VERIFY, "--gguf", "model.gguf"),
        UNSAFE,
        ("truncated",),
        lambda p: p.edit("model.gguf", cut(100)),
    ),
    Case("not a GGUF", ("inspect", "model.gguf"), UNSAFE, ("magic",), lambda p: p.edit("model.gguf", flip(0))),
    Case(
        "2^60 tensors",
        ("inspect", "model.gguf"),
        UNSAFE,
        ("claims",),
        lambda p: p.edit("model.gguf", lambda raw: raw[:8] + (2**60).to_bytes(8, "little") + raw[16:]),
    ),
    Case(
        "flipped GGUF",
        ("inspect", "model.gguf", "base.qalora"),
        PARITY,
        ("codes", "differ"),
        lambda p: p.edit("model.gguf", flip(-40)),
    ),
    Case(
        "GGUF against its manifest",
        ("inspect", "--check", "model.gguf"),
        PARITY,
        ("does not match its manifest",),
        lambda p: p.edit("model.gguf", flip(-40)),
    ),
    # ONNX
    Case(
        "truncated ONNX data",
        ("inspect", "onnx"),
        UNSAFE,
        ("truncated",),
        lambda p: p.edit("onnx/onnx/model.onnx_data", cut(1)),
    ),
    Case(
        "truncated ONNX graph",
        ("inspect", "onnx"),
        BAD,
        ("not an ONNX model",),
        lambda p: p.edit("onnx/onnx/model.onnx", cut(1000)),
    ),
    Case(
        "flipped ONNX",
        ("inspect", "onnx", "base.qalora"),
        PARITY,
        ("differ",),
        lambda p: p.edit("onnx/onnx/model.onnx_data", flip(-3)),
    ),
    Case("absurd ONNX shape", ("inspect", "onnx"), UNSAFE, ("claims shape",), lambda p: p.edit_graph(absurd_shape)),
    Case("ONNX offset near 2^63", ("inspect", "onnx"), UNSAFE, ("offset",), external("offset", str(2**63 - 1))),
    Case(
        "ONNX data outside",
        (*VERIFY, "--onnx", "onnx"),
        UNSAFE,
        ("outside its folder",),
        external("location", "../base.qalora/model.safetensors"),
    ),
    Case(
        "ONNX data absolute", ("inspect", "onnx"), UNSAFE, ("outside its folder",), external("location", "/etc/passwd")
    ),
    # paths
    Case(
        "a shard is missing",
        QUANTIZE,
        BAD,
        ("model-2.safetensors", "not found"),
        lambda p: shard_index(p, "model-2.safetensors"),
    ),
    Case(
        "shard index escapes",
        QUANTIZE,
        UNSAFE,
        ("outside its folder", "../base.qalora"),
        lambda p: shard_index(p, "../base.qalora/model.safetensors"),
    ),
    Case(
        "weights are a symlink",
        QUANTIZE,
        UNSAFE,
        ("symbolic link",),
        lambda p: ((p / WEIGHTS).rename(p / "elsewhere"), (p / WEIGHTS).symlink_to(p / "elsewhere")),
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_damaged_files(case: Case, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    judge(case, place, capsys)
