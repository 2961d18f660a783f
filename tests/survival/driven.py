"""Runs of a tiny recipe through the driver: start, watch, kill, and what is left on disk."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

RECIPE = """
model = "model"
out = "out"
[quantize]
calibration = "text.txt"
calibration_samples = 8
sequence_length = 64
[train]
data = "data.jsonl"
validation = "validation.jsonl"
rank = 2
max_steps = 12
batch_size = 2
sequence_length = 64
evaluate_every = 3
[evaluate]
data = "validation.jsonl"
max_new_tokens = 4
[verify]
runtimes = ["llama.cpp"]
threads = 1
"""
STAGES = (
    "quantize",
    "train",
    "merge",
    "evaluate base",
    "evaluate merged",
    "export gguf",
    "export onnx",
    "verify-parity",
)
OUTPUTS = (
    "base.qalora",
    "adapter",
    "merged.qalora",
    "score.base.json",
    "score.merged.json",
    "model.gguf",
    "onnx",
    "report",
)
# Holds times and speeds (report, adapter.training), hashes of those (run.json), or nothing (.lock).
UNEQUAL = ("report", "adapter.training", "run.json", ".lock")
TIMEOUT = 300.0  # seconds; a run takes a few


def write_recipe(folder: Path) -> Path:
    """Recipe, data and calibration text beside `folder`/model."""
    for name, numbers in (("data", range(12)), ("validation", range(12, 16))):
        turns = [[("user", f"turn on lamp {n}"), ("assistant", f"on {n}")] for n in numbers]
        rows = [{"messages": [{"role": role, "content": content} for role, content in turn]} for turn in turns]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "text.txt").write_text("Turn the lights in the kitchen on at 7:30, please.\n" * 200, encoding="utf-8")
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    return folder / "recipe.toml"


@dataclass
class Attempt:
    """One forked run: its process (also its group) and its log."""

    pid: int
    log: Path

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def changes(self) -> int:
        return int(self.log.with_name(self.log.name + ".changes").read_text() or 0)

    def started(self, stage: str) -> bool:
        return f"] {stage} →" in self.said()

    def alive(self) -> bool:
        """Whether it still runs; a zombie has ended."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    def wait_for(self, stage: str) -> bool:
        """Until the stage has printed its title; False when it is up to date already, or the run ended before."""
        end = time.monotonic() + TIMEOUT
        while not self.started(stage):
            assert time.monotonic() < end, self.said()
            if f"] {stage} up to date" in self.said():
                return False
            if not self.alive():
                return self.started(stage)
            time.sleep(0.005)
        return True

    def kill(self, *, group: bool) -> None:
        """SIGKILL to everything it started, or to it alone, as the system does when memory runs out."""
        try:
            (os.killpg if group else os.kill)(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


class Driver:
    """A process that has imported everything and forks one attempt after another."""

    def __init__(self, folder: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
        self.folder, self.count = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.survival.driver"],
            env=environment,
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._line() == "ready"

    def __enter__(self) -> Driver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(TIMEOUT)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def start(self, *arguments: object, die_at: int | None = None, **options: object) -> Attempt:
        return self.start_together([self.request(arguments, die_at=die_at, **options)])[0]

    def rivals(self, *commands: tuple[object, ...], apart: float = 0.0) -> list[tuple[int, str]]:
        """Commands started together, each `apart` seconds after the one before: exit code and what it said."""
        requests = [self.request(command, delay=apart * number) for number, command in enumerate(commands)]
        attempts = self.start_together(requests)
        codes = [self.ended() for _ in attempts]
        return [(code, attempt.said()) for code, attempt in zip(codes, attempts, strict=True)]

    def start_together(self, requests: list[dict[str, Any]]) -> list[Attempt]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(requests) + "\n")
        self.process.stdin.flush()
        return [Attempt(int(self._line()), Path(request["log"])) for request in requests]

    def request(self, arguments: tuple[object, ...], **options: object) -> dict[str, Any]:
        """What the driver reads (see there); a log of its own is chosen."""
        self.count += 1
        log = self.folder / f"log{self.count}"
        log.touch()
        return {"arguments": [str(argument) for argument in arguments], "log": str(log), **options}

    def ended(self) -> int:
        """Exit code of the attempt, −9 when it was killed."""
        return int(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def hashes(out: Path) -> dict[str, str]:
    """sha256 of every file that must not depend on how often the run was killed."""
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.relative_to(out).parts[0] not in UNEQUAL
    }


def gates(out: Path) -> list[tuple[str, str, str]]:
    entries = json.loads((out / "report" / "report.json").read_text(encoding="utf-8"))["gates"]
    return [(entry["gate"], entry["runtime"], entry["status"]) for entry in entries]


def left_overs(out: Path) -> list[str]:
    """Temporary names and checkpoints that should be gone."""
    return [str(path) for path in out.rglob("*") if path.name.endswith(".partial") or "checkpoint-" in path.name]
