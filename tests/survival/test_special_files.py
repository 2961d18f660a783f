"""Something else where a file is expected: a pipe nobody writes to, a device without end, a socket, a broken link."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.survival.place import (
    BAD,
    EVALUATE,
    GGUF,
    MERGE,
    ONNX,
    QUANTIZE,
    RTN,
    RUN,
    TRAIN,
    UNSAFE,
    VERIFY,
    Place,
    check_message,
    partials,
    run,
)

SECONDS, MEMORY = 20, 4 << 30


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # the name of a socket may have 107 characters
        server.bind(path.name)
        os.chdir(here)


KINDS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: path.mkdir(),
    "socket": listening,
    "loop": lambda path: path.symlink_to(path.name),
    "dangling": lambda path: path.symlink_to("nowhere"),
}
CALIBRATED = ("quantize", "model", "--out", "new", "--calibration")
MODEL = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
)
CANONICAL = ("manifest.json", "config.json", "model.safetensors")
INSPECT_BASE, INSPECT_ONNX = ("inspect", "base.qalora", "--check"), ("inspect", "onnx", "--check")
CASES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("recipe.toml", RUN),
    *((f"model/{name}", QUANTIZE) for name in MODEL),
    ("model", QUANTIZE),
    ("model.gguf", ("quantize", "model.gguf", "--out", "new", *RTN)),
    ("text.txt", (*CALIBRATED, "text.txt")),
    ("data.jsonl", (*CALIBRATED, "data.jsonl")),
    ("data.jsonl", TRAIN),
    ("text.txt", (*TRAIN[:3], "text.txt", *TRAIN[4:])),
    ("data.jsonl", (*TRAIN[:3], "text.txt", *TRAIN[4:], "--validation", "data.jsonl")),
    *((f"base.qalora/{name}", TRAIN) for name in CANONICAL),
    ("base.qalora", TRAIN),
    *((f"base.qalora/{name}", MERGE) for name in CANONICAL),
    *((f"adapter/{name}", MERGE) for name in ("manifest.json", "adapter_config.json", "adapter_model.safetensors")),
    ("adapter", MERGE),
    *((f"base.qalora/{name}", GGUF) for name in (*CANONICAL, "tokenizer.json", "chat_template.jinja")),
    *((f"base.qalora/{name}", ONNX) for name in (*CANONICAL, "tokenizer_config.json")),
    ("data.jsonl", EVALUATE),
    *((f"base.qalora/{name}", EVALUATE) for name in CANONICAL),
    ("model.gguf", (*VERIFY, "--gguf", "model.gguf")),
    ("model.gguf.manifest.json", (*VERIFY, "--gguf", "model.gguf")),
    ("onnx", (*VERIFY, "--onnx", "onnx")),
    ("data.jsonl", (*VERIFY, "--gguf", "model.gguf", "--prompts", "data.jsonl")),
    *((f"base.qalora/{name}", INSPECT_BASE) for name in CANONICAL),
    ("base.qalora", INSPECT_BASE),
    ("model.gguf", ("inspect", "model.gguf", "--facts")),
    ("model.gguf.manifest.json", ("inspect", "model.gguf", "--check")),
    *((f"onnx/{name}", INSPECT_ONNX) for name in ("manifest.json", "genai_config.json", "onnx/model.onnx")),
    ("onnx/onnx/model.onnx_data", INSPECT_ONNX),
    ("adapter/adapter_config.json", ("inspect", "adapter", "--check")),
)


@pytest.fixture(autouse=True)
def hurry() -> Iterator[None]:
    """A command that waits fails instead of hanging the suite."""

    def late(*_: object) -> None:
        raise AssertionError(f"no end in {SECONDS} s")

    before, memory = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, memory[1]))
    signal.alarm(SECONDS * len(KINDS))
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, memory)


@pytest.mark.parametrize(
    ("name", "command"), CASES, ids=lambda value: value if isinstance(value, str) else " ".join(value[:2])
)
def test_one_clear_message(
    name: str, command: tuple[str, ...], place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    path = place / name
    assert path.exists(), name
    path.rename(path.with_name("aside"))
    for kind, make in KINDS.items():
        if kind == "folder" and (path.with_name("aside")).is_dir():
            continue  # is what belongs there
        make(path)
        code = run(*command)
        captured = capsys.readouterr()
        check_message(captured.err + captured.out, (path.name,))
        assert code in (BAD, UNSAFE), (kind, captured.err)
        assert not (place / "new").exists(), kind
        assert partials(place.path) == [], kind
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
