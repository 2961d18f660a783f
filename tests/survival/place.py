"""What the tests of bad input share: a folder with everything in it, commands that read it, what a message must say."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from qalora_export.cli.main import main
from tests.models import make_tiny_canonical
from tests.qalora.adapters import own_adapter
from tests.verify.exports import export_both

OK, PARITY, BAD, RUNTIME, UNSAFE = range(5)
RTN = ("--method", "rtn")
GOOD_CHAT = '{"messages": [{"role": "user", "content": "on"}, {"role": "assistant", "content": "done"}]}'


@dataclass(frozen=True)
class Place:
    """A folder of its own with copies of everything: model, base.qalora, adapter, model.gguf, onnx, data.jsonl."""

    path: Path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def edit(self, name: str, change: Callable[[bytes], bytes]) -> None:
        (self / name).write_bytes(change((self / name).read_bytes()))

    def edit_json(self, name: str, change: Callable[[Any], object]) -> None:
        content = json.loads((self / name).read_text(encoding="utf-8"))
        change(content)
        (self / name).write_text(json.dumps(content), encoding="utf-8")

    def edit_tensors(self, name: str, change: Callable[[dict[str, np.ndarray]], object]) -> None:
        tensors = load_file(self / name)
        change(tensors)
        save_file(tensors, self / name)

    def edit_graph(self, change: Callable[[onnx.ModelProto], object]) -> None:
        model = onnx.load(self / "onnx/onnx/model.onnx", load_external_data=False)
        change(model)
        (self / "onnx/onnx/model.onnx").write_bytes(model.SerializeToString())

    def write(self, name: str, text: str) -> None:
        (self / name).write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Case:
    """command: words, file names relative to the place. words: what the message must say. out: must not appear."""

    name: str
    command: tuple[str, ...]
    code: int
    words: tuple[str, ...]
    make: Callable[[Place], object] = field(default=lambda place: None)
    out: str = "new"


def make_original(folder: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, folder / "model")
    make_tiny_canonical(folder / "base.qalora", folder / "model")
    own_adapter(folder / "base.qalora", folder / "adapter")
    export_both(folder / "base.qalora", folder)
    (folder / "data.jsonl").write_text(GOOD_CHAT + "\n", encoding="utf-8")
    (folder / "text.txt").write_text("Turn the lights in the kitchen on.\n" * 50, encoding="utf-8")
    (folder / "recipe.toml").write_text('model = "model"\nout = "new"\n[quantize]\nmethod = "rtn"\n', encoding="utf-8")


def flip(position: int, bits: int = 0xFF) -> Callable[[bytes], bytes]:
    def change(raw: bytes) -> bytes:
        damaged = bytearray(raw)
        damaged[position] ^= bits
        return bytes(damaged)

    return change


UP = "model.layers.1.mlp.up_proj"
QUANTIZE = ("quantize", "model", "--out", "new", *RTN)
TRAIN = ("train", "base.qalora", "--data", "data.jsonl", "--out", "new")
MERGE = ("merge", "base.qalora", "adapter", "--out", "new")
GGUF = ("export", "gguf", "base.qalora", "--out", "new")
ONNX = ("export", "onnx", "base.qalora", "--out", "new")
VERIFY = ("verify-parity", "base.qalora", "--out", "new")
RUN = ("run", "recipe.toml")
EVALUATE = ("evaluate", "base.qalora", "--data", "data.jsonl", "--out", "new")
WEIGHTS, BASE = "model/model.safetensors", "base.qalora/model.safetensors"
WRITERS = (QUANTIZE, TRAIN, MERGE, GGUF, ONNX, (*VERIFY, "--gguf", "model.gguf"), EVALUATE)
REFUTED = ("differs from its manifest",)


def run(*command: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in command])
    return int(caught.value.code or 0)


def partials(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.name.endswith(".partial")]


def check_message(said: str, words: tuple[str, ...]) -> None:
    flat = " ".join(said.split())
    assert "Traceback" not in said, said
    assert "error" in flat.lower() or "differ" in flat or "does not match" in flat, said
    for word in words:
        assert word in flat, f"{word!r} is missing in: {flat}"


def judge(case: Case, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a case: its message, its code, nothing written, nothing half-written."""
    case.make(place)
    code = run(*case.command)
    captured = capsys.readouterr()
    check_message(re.sub(r"[│╭╮╰╯─]", " ", captured.err + captured.out), case.words)
    assert code == case.code
    assert not (place / case.out).exists()
    assert partials(place.path) == []
