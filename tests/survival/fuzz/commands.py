"""Whole command lines as readers: their exit code and what they print are judged too."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

from tests.survival.fuzz import mutate

# Exit codes a command may end with; 70 is a defect and prints its traceback.
DOCUMENTED = range(5)


class Refused(Exception):
    """A command ended with one of the documented codes that are not 0."""


class Misbehaved(AssertionError):
    """A command ended with another code, printed a traceback or something that steers a terminal."""


def command(*words: str, folder: Path) -> None:
    """Run the command line with {} in the words standing for the folder of seeds."""
    run_command([word.replace("{}", str(folder)) for word in words])


def run_command(words: list[str]) -> None:
    from qalora_export.cli.main import main

    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    before, code = (sys.stdout, sys.stderr), None
    sys.stdout = sys.stderr = stream
    try:
        main(words)
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdout, sys.stderr = before
        stream.flush()
    said = stream.buffer.getvalue().decode("utf-8")  # type: ignore[attr-defined]
    steering = {c for c in said if not c.isprintable() and c not in "\n\t\r"}
    if code not in DOCUMENTED or "Traceback" in said or steering:
        raise Misbehaved(f"exit {code}, {sorted(steering)!r}, {said[-3000:]}")
    if code:
        raise Refused(said[-300:])


def stage(*words: str) -> Callable[[Path], object]:
    return partial(_stage, words)


def _stage(words: tuple[str, ...], folder: Path) -> None:
    command(*words, folder=folder)


WORDS = (
    *("inspect", "quantize", "train", "merge", "evaluate", "export", "gguf", "onnx", "run", "verify-parity", "doctor"),
    *("--help", "--out", "--force", "--facts", "--check", "--bits", "--rule", "--seed", "--set", "--data", "--rank"),
    *("--method", "rtn", "--dry-run", "--learning-rate", "--alpha", "--targets", "--limit", "--max-steps", "--version"),
    *(
        "--gguf",
        "--onnx",
        "--runtime",
        "--threads",
        "--positions",
        "--group-size",
        "--calibration",
        "--recipe",
        "--pool",
    ),
    *("{}/model", "{}/base.qalora", "{}/adapter", "{}/model.gguf", "{}/onnx", "{}/recipe.toml", "{}/data.jsonl", "{}"),
    *("{}/none", "{}/text.txt", "/dev/null", "/dev/zero", "/proc/self/mem", "/", ".", "{}/loop", "{}/fifo", "{}/new"),
    *("train.rank=8", "quantize.rules=[]", "model=\u0000", "*=bits:3", "*.up_proj=skip", "x=bits:", "=", "a.b.c=1"),
)


def arguments(folder: Path) -> None:
    """Random command lines; the damaged `file` is their seed."""
    random = Random((folder / "arguments.txt").read_bytes())
    verbs = (
        ("inspect",),
        ("quantize", "{}/model", "--out", "{}/new", "--method", "rtn"),
        ("train", "{}/base.qalora", "--data", "{}/data.jsonl", "--out", "{}/new", "--dry-run"),
        ("merge", "{}/base.qalora", "{}/adapter", "--out", "{}/new", "--no-compare-logits"),
        ("export", "gguf", "{}/base.qalora", "--out", "{}/new"),
        ("export", "onnx", "{}/none", "--out", "{}/new"),
        ("run", "{}/none.toml"),
        ("verify-parity", "{}/none", "--out", "{}/new"),
        ("evaluate", "{}/none", "--data", "{}/data.jsonl"),
        (),
    )
    words = list(random.choice(verbs))
    for _ in range(random.randrange(1, 4)):
        at = random.randrange(len(words) + 1)
        new = random.choice((*WORDS, *WORDS, *mutate.TEXTS, *map(str, mutate.NUMBERS)))
        words[at : at + random.randrange(2)] = [new] + ([str(mutate.hostile_value(random))] if new[:2] == "--" else [])
    if "/dev/zero" in words or os.sep in words:  # reading all of the machine is no reader's fault
        words = [word for word in words if word not in ("/",)]
    command(*(word.replace("\0", "") for word in words), folder=folder)
