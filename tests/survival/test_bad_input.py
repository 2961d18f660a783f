"""Bad input, verb by verb: one clear message, the right exit code, no traceback, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from qalora_export.cli.main import INTERNAL_ERROR, main
from tests.conftest import MadeOnce
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


@pytest.fixture(scope="module")
def original(tiny_model: Path, made_once: MadeOnce) -> Path:
    return made_once("original", lambda folder: make_original(folder, tiny_model))


def make_original(folder: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, folder / "model")
    make_tiny_canonical(folder / "base.qalora", folder / "model")
    own_adapter(folder / "base.qalora", folder / "adapter")
    export_both(folder / "base.qalora", folder)
    (folder / "data.jsonl").write_text(GOOD_CHAT + "\n", encoding="utf-8")
    (folder / "text.txt").write_text("Turn the lights in the kitchen on.\n" * 50, encoding="utf-8")
    (folder / "recipe.toml").write_text('model = "model"\nout = "new"\n[quantize]\nmethod = "rtn"\n', encoding="utf-8")


@pytest.fixture
def place(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    shutil.copytree(original, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return Place(tmp_path / "place")


def cut(count: int) -> Callable[[bytes], bytes]:
    return lambda raw: raw[:-count]


def flip(position: int, bits: int = 0xFF) -> Callable[[bytes], bytes]:
    def change(raw: bytes) -> bytes:
        damaged = bytearray(raw)
        damaged[position] ^= bits
        return bytes(damaged)

    return change


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


def width(tensors: dict[str, np.ndarray]) -> None:
    """q_proj of layer 0 with 100 in-features, which no group size divides."""
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name][:, :100])


def poison(name: str, value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name].flat[7] = value

    return change


def all_dims(size: int) -> Callable[[Any], None]:
    return lambda config: config.update(hidden_size=size, intermediate_size=2 * size)


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
LONG_CHAT = json.dumps(
    {"messages": [{"role": "user", "content": "lamp " * 400}, {"role": "assistant", "content": "y"}]}
)

REFUTED = ("differs from its manifest",)
CASES = (
    # missing
    Case("no model folder", ("quantize", "none", "--out", "new", *RTN), BAD, ("model folder not found", "none")),
    Case("no weights", QUANTIZE, BAD, ("no safetensors weights",), lambda p: (p / WEIGHTS).unlink()),
    Case(
        "pickled weights",
        QUANTIZE,
        BAD,
        ("pickled", "safetensors"),
        lambda p: (p / WEIGHTS).rename(p / "model/pytorch_model.bin"),
    ),
    Case("no config", QUANTIZE, BAD, ("config.json", "not found"), lambda p: (p / "model/config.json").unlink()),
    Case("no recipe", ("run", "none.toml"), BAD, ("recipe not found", "none.toml")),
    Case(
        "no training data",
        ("train", "base.qalora", "--data", "none.jsonl", "--out", "new"),
        BAD,
        ("data file not found", "none.jsonl"),
    ),
    Case("no calibration", ("quantize", "model", "--out", "new"), BAD, ("calibration", "--calibration FILE")),
    Case("no calibration file", ("quantize", "model", "--out", "new", "--calibration", "none.txt"), BAD, ("none.txt",)),
    Case("no adapter", ("merge", "base.qalora", "none", "--out", "new"), BAD, ("adapter folder not found", "none")),
    Case("no artifact", ("inspect", "none.gguf"), BAD, ("GGUF file not found", "none.gguf")),
    Case("no artifact to verify", (*VERIFY, "--gguf", "none.gguf"), BAD, ("none.gguf", "--gguf")),
    Case("no data to evaluate", ("evaluate", "base.qalora", "--data", "none.jsonl"), BAD, ("none.jsonl",)),
    Case(
        "a shard is missing",
        QUANTIZE,
        BAD,
        ("model-2.safetensors", "not found"),
        lambda p: shard_index(p, "model-2.safetensors"),
    ),
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
    # what cannot be quantized
    Case(
        "group size does not divide",
        (
            "quantize",
            "model",
            "--out",
            "new",
            *RTN,
            "--group-size",
            "128",
            "--rule",
            "*.up_proj=group:128",
            "--strict-groups",
        ),
        BAD,
        ("96 in-features", "q_proj"),
        lambda p: narrow_model(p),
    ),
    Case("matrix of another shape", QUANTIZE, BAD, ("q_proj",), lambda p: p.edit_tensors(WEIGHTS, width)),
    Case(
        "NaN in a weight",
        QUANTIZE,
        BAD,
        (f"{UP}.weight", "finite"),
        lambda p: p.edit_tensors(WEIGHTS, poison(f"{UP}.weight", np.nan)),
    ),
    Case(
        "Inf in a weight",
        QUANTIZE,
        BAD,
        (f"{UP}.weight", "finite"),
        lambda p: p.edit_tensors(WEIGHTS, poison(f"{UP}.weight", np.inf)),
    ),
    Case(
        "NaN in a scale",
        GGUF,
        BAD,
        REFUTED,
        lambda p: p.edit_tensors(BASE, poison(f"{UP}.scale", np.nan)),
    ),
    Case(
        "NaN in a scale, ONNX",
        ONNX,
        BAD,
        REFUTED,
        lambda p: p.edit_tensors(BASE, poison(f"{UP}.scale", np.nan)),
    ),
    Case(
        "architecture",
        QUANTIZE,
        BAD,
        ("MambaForCausalLM", "LlamaForCausalLM"),
        lambda p: p.edit_json("model/config.json", lambda c: c.update(architectures=["MambaForCausalLM"])),
    ),
    Case(
        "architecture to export",
        GGUF,
        BAD,
        REFUTED,
        lambda p: p.edit_json("base.qalora/config.json", lambda c: c.update(architectures=["MambaForCausalLM"])),
    ),
    Case("not canonical", ("export", "gguf", "model", "--out", "new"), BAD, ("not a canonical", "quantize")),
    Case("bits 5", (*QUANTIZE, "--bits", "5"), BAD, ("bits",)),
    # recipes and options
    Case(
        "unknown recipe key",
        RUN,
        BAD,
        ("train.rnk", "did you mean 'rank'"),
        lambda p: p.write("recipe.toml", 'model = "model"\nout = "new"\n[train]\nrnk = 3\n'),
    ),
    Case("recipe is no TOML", RUN, BAD, ("not valid TOML", "line 1"), lambda p: p.write("recipe.toml", "model = \n")),
    Case(
        "recipe of the wrong type",
        RUN,
        BAD,
        ("train.rank",),
        lambda p: p.write("recipe.toml", 'model = "model"\nout = "new"\n[train]\nrank = "3"\n'),
    ),
    Case(
        "recipe path of nobody",
        RUN,
        BAD,
        ("unknown user", "~nobody-here"),
        lambda p: p.write("recipe.toml", 'model = "~nobody-here/model"\nout = "new"\n'),
    ),
    Case(
        "recipe with a date",
        RUN,
        BAD,
        ("train.rank",),
        lambda p: p.write("recipe.toml", 'model = "model"\nout = "new"\n[train]\nrank = 1979-05-27\n'),
    ),
    Case(
        "recipe table is a number",
        RUN,
        BAD,
        ("train",),
        lambda p: p.write("recipe.toml", 'model = "model"\nout = "new"\ntrain = 3\n'),
    ),
    Case("override below a number", (*RUN, "--set", "model.x=1"), BAD, ("model.x",)),
    Case("unknown key by --set", (*RUN, "--set", "train.rnk=1"), BAD, ("did you mean 'rank'",)),
    Case("override without value", (*RUN, "--set", "train.rank"), BAD, ("KEY=VALUE",)),
    Case("unknown option", (*QUANTIZE, "--bitz", "4"), BAD, ("--bitz",)),
    Case("unknown verb", ("quantise", "model"), BAD, ("quantise",)),
    Case("missing option", ("merge", "base.qalora", "adapter"), BAD, ("--out",)),
    Case(
        "run.json of another tool",
        RUN,
        BAD,
        ("run.json", "--force"),
        lambda p: ((p / "new").mkdir(), p.write("new/run.json", "[1]")),
        out="new/base.qalora",
    ),
    # data
    Case("empty data", TRAIN, BAD, ("empty", "data.jsonl"), lambda p: p.write("data.jsonl", "\n\n")),
    Case(
        "a line that does not parse",
        TRAIN,
        BAD,
        ("not valid JSON", "line 3"),
        lambda p: p.write("data.jsonl", f"{GOOD_CHAT}\n\n{{]\n"),
    ),
    Case(
        "data is binary",
        TRAIN,
        BAD,
        ("line 2",),
        lambda p: (p / "data.jsonl").write_bytes(GOOD_CHAT.encode() + b"\n\xff\xfe\n"),
    ),
    Case(
        "longer than the context",
        (*TRAIN, "--sequence-length", "4096", "--too-long", "error"),
        BAD,
        ("line 2", "context"),
        lambda p: p.write("data.jsonl", f"{GOOD_CHAT}\n{LONG_CHAT}\n"),
    ),
    Case(
        "empty calibration",
        ("quantize", "model", "--out", "new", "--calibration", "text.txt"),
        BAD,
        ("empty",),
        lambda p: p.write("text.txt", ""),
    ),
    Case(
        "calibration line",
        ("quantize", "model", "--out", "new", "--calibration", "data.jsonl"),
        BAD,
        ("data.jsonl, line 2",),
        lambda p: p.write("data.jsonl", f"{GOOD_CHAT}\n{{\n"),
    ),
    Case("empty test data", EVALUATE, BAD, ("empty",), lambda p: p.write("data.jsonl", "")),
    Case("test line", EVALUATE, BAD, ("line 2",), lambda p: p.write("data.jsonl", f"{GOOD_CHAT}\n{{\n")),
    Case(
        "test data is binary", EVALUATE, BAD, ("data.jsonl",), lambda p: (p / "data.jsonl").write_bytes(b"\xff\xfe\n")
    ),
    Case(
        "prompt longer than the context",
        EVALUATE,
        BAD,
        ("line 2", "context"),
        lambda p: p.write("data.jsonl", f"{GOOD_CHAT}\n{LONG_CHAT}\n"),
    ),
    Case(
        "verify prompts",
        (*VERIFY, "--gguf", "model.gguf", "--prompts", "data.jsonl"),
        BAD,
        ("data.jsonl, line 2",),
        lambda p: p.write("data.jsonl", f"{GOOD_CHAT}\n{{\n"),
    ),
)


def narrow_model(place: Place) -> None:
    """hidden_size 96: 32 divides it, 64 and 128 do not."""
    from tests.models import make_tiny_model

    shutil.rmtree(place / "model")
    make_tiny_model(place / "model", hidden_size=96)


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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Case, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    case.make(place)
    code = run(*case.command)
    captured = capsys.readouterr()
    check_message(re.sub(r"[│╭╮╰╯─]", " ", captured.err + captured.out), case.words)
    assert code == case.code
    assert not (place / case.out).exists()
    assert partials(place.path) == []


WRITERS = (QUANTIZE, TRAIN, MERGE, GGUF, ONNX, (*VERIFY, "--gguf", "model.gguf"), EVALUATE)


@pytest.mark.parametrize("command", WRITERS, ids=lambda command: command[0] + command[1][:5])
def test_an_existing_output_is_refused(
    command: tuple[str, ...], place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.write("new", "mine")
    assert run(*command) == BAD
    check_message(capsys.readouterr().err, ("exists already", "new", "--force"))
    assert (place / "new").read_text() == "mine"


@pytest.mark.parametrize("command", WRITERS, ids=lambda command: command[0] + command[1][:5])
def test_a_folder_that_cannot_be_written(
    command: tuple[str, ...], place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """Below a regular file nothing can be made, not even by root, whom permissions let pass."""
    words = [word.replace("new", "text.txt/new") if word == "new" else word for word in command]
    assert run(*words) == BAD
    check_message(capsys.readouterr().err, ("could not write", "text.txt", "permissions"))
    assert (place / "text.txt").is_file()


def test_run_into_a_folder_that_cannot_be_written(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*RUN, "--out", "text.txt/new") == BAD
    check_message(capsys.readouterr().err, ("could not write", "text.txt"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("command", [QUANTIZE, MERGE, GGUF, ONNX], ids=lambda command: command[0] + command[1][:5])
def test_a_full_disk(
    command: tuple[str, ...],
    number: int,
    place: Place,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Syncing is where a full disk shows at the latest."""

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        code = run(*command)
    assert code == BAD
    check_message(capsys.readouterr().err, (os.strerror(number), "new", "free disk space"))
    assert not (place / "new").exists()
    assert partials(place.path) == []


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
from qalora_export.cli.main import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize(
    "command", [QUANTIZE, GGUF, ONNX, TRAIN, MERGE], ids=lambda command: command[0] + command[1][:5]
)
def test_a_file_that_may_not_grow(command: tuple[str, ...], place: Place) -> None:
    """The real thing: the system refuses bytes beyond 64 kB a file in the middle of writing."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    extra = ("--max-steps", "1", "--rank", "128") if command is TRAIN else ()
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(64 << 10), *command, *extra],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_WAIT_POLICY": "passive"},
    )
    check_message(done.stderr, ("could not write", "free disk space"))
    assert done.returncode == BAD
    assert not (place / "new").exists()
    assert partials(place.path) == []


@pytest.mark.parametrize(
    ("module", "package"), [("onnxruntime", "onnxruntime"), ("onnxruntime_genai", "onnxruntime-genai")]
)
def test_an_absent_runtime_is_exit_3_with_its_package(module: str, package: str, place: Place) -> None:
    """Not installed, as the runner's process sees it: a module of that name that cannot be imported."""
    place.write(f"{module}.py", "raise ModuleNotFoundError(f'No module named {__name__!r}', name=__name__)\n")
    command = [*VERIFY, "--onnx", "onnx", "--runtime", package, "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "qalora_export.cli", *command],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(place.path), "OMP_WAIT_POLICY": "passive"},
    )
    assert done.returncode == RUNTIME, done.stderr
    assert f"pip install {package}" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    report = json.loads((place / "new/report.json").read_text())
    assert {entry["status"] for entry in report["gates"] if entry["gate"] == "G3"} == {"not run"}


def test_a_crashing_runtime_is_exit_3_with_signal_and_remedy(place: Place) -> None:
    """A stand-in for the package that dies in the runner's process and is the real one everywhere else."""
    place.write(
        "sitecustomize.py",
        "import os, signal, sys\nif 'qalora_runtimes.onnxruntime_' in sys.orig_argv:\n"
        "    os.kill(os.getpid(), signal.SIGSEGV)\n",
    )
    command = [*VERIFY, "--onnx", "onnx", "--runtime", "onnxruntime", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "qalora_export.cli", *command],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(place.path), "OMP_WAIT_POLICY": "passive"},
    )
    assert done.returncode == RUNTIME, done.stderr
    said = " ".join(done.stderr.split())
    assert "SIGSEGV" in said and "a kernel read outside its memory" in said
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (MemoryError("Unable to allocate 3 TiB"), BAD, ("out of memory", "3 TiB")),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), BAD, ("Permission denied", "/data/x")),
    ],
)
def test_what_the_system_refuses_is_said_clearly(
    error: Exception,
    code: int,
    words: tuple[str, ...],
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("qalora_export.qalora.merge.merge", fail)
    assert run(*MERGE) == code
    check_message(capsys.readouterr().err, words)


def test_a_defect_of_ours_shows_its_traceback_and_no_documented_code(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr("qalora_export.qalora.merge.merge", fail)
    assert run(*MERGE) == INTERNAL_ERROR
    said = capsys.readouterr().err
    assert "Traceback" in said and "oops" in said and "internal error" in said


def test_through_the_installed_command(place: Place) -> None:
    """The same, as a user's shell sees it."""
    command = [str(Path(sys.executable).with_name("qalora-export")), "quantize", "none", "--out", "new", *RTN]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == BAD
    assert done.stderr.splitlines() == [
        "error: model folder not found",
        "  where: none",
        "  next: give the folder that holds config.json, a .gguf file, or a hub id such as HuggingFaceTB/SmolLM2-135M",
    ]
