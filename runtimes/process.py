"""A runner's process: started, watched, and ended when it does no more, floods its log or fills the disk.

How long a runner may be silent is bounded by the work it does between two signs of life (heartbeat): loading a model
and the longest single prompt. A process that is stopped, or whose main thread is gone while it stays, is silent too and
is named as what it is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qalora_runtimes.heartbeat import ANSWERED, Beat, read

LOG_TAIL = 4000  # characters
MAX_LOG = 64 << 20  # bytes
PATIENCE = "QALORA_RUNNER_PATIENCE"  # environment: seconds, in place of patience_for
LEAST_PATIENCE = 300.0  # seconds
# Slower than any machine that a model of this size is put on: a network disk, one old core.
LOADED_PER_SECOND, MULTIPLIED_PER_SECOND = 20e6, 5e9  # bytes, floating-point operations
OPERATIONS_PER_BYTE = 4.0  # and token: two codes a byte, a multiplication and an addition each
HALTED_GRACE = 60.0  # seconds that a stopped process may stay so: a user may have pressed Ctrl-Z
EXIT_GRACE = 60.0  # seconds between the answer and the end of the process
FIRST_NOTICE = 30.0  # seconds of silence; then twice as many, and so on
SHORTEST_POLL, LONGEST_POLL = 0.02, 0.5
HALTED = {"T": "it is stopped (SIGSTOP)", "t": "a debugger holds it", "Z": "its main thread has ended, the others not"}


@dataclass(frozen=True)
class Watch:
    """patience: seconds without a sign of life. timeout: seconds in all, None for no bound.

    limits: file -> bytes it may grow to while the runner works. on_beat: told each new sign of life. on_silence: told
    one line for the user now and then while there is none.
    """

    patience: float = LEAST_PATIENCE
    timeout: float | None = None
    limits: dict[Path, int] = field(default_factory=dict)
    on_beat: Callable[[Beat], None] = lambda _: None
    on_silence: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class Ended:
    """code: exit code, −n after signal n, None when we ended it, and then why. log: end of stdout and stderr."""

    code: int | None
    log: str
    why: str = ""


def patience_for(model: Path, longest: int) -> float:
    """Seconds of silence that a run may need: its model loaded, and one prompt of `longest` tokens, in one piece."""
    if set_by_user := os.environ.get(PATIENCE):
        return _seconds(set_by_user)
    files = [model] if model.is_file() else [path for path in model.glob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    return LEAST_PATIENCE + size / LOADED_PER_SECOND + OPERATIONS_PER_BYTE * size * longest / MULTIPLIED_PER_SECOND


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{PATIENCE} is {text!r}; it must be a number of seconds above 0")
    return seconds


def run_module(module: str, words: Sequence[object], workdir: Path, watch: Watch) -> Ended:
    """Run `python -m module` and watch it. workdir: holds stderr.txt afterwards.

    The module is told its caller and where to beat (runner.add_caller), so that it does not outlive one that is killed.
    """
    log, pulse = workdir / "stderr.txt", workdir / "heartbeat.txt"
    pulse.unlink(missing_ok=True)
    caller = ["--parent", os.getpid(), "--heartbeat", pulse]
    command = [sys.executable, "-P", "-m", module, *map(str, [*words, *caller])]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        try:
            why = _Watcher(process, pulse, {**watch.limits, log: MAX_LOG}, watch).until_ended()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            pulse.unlink(missing_ok=True)
    return Ended(None if why else process.returncode, _tail(log), why)


class _Watcher:
    def __init__(self, process: subprocess.Popen[bytes], pulse: Path, limits: dict[Path, int], watch: Watch) -> None:
        self._process, self._pulse, self._limits, self._watch = process, pulse, limits, watch
        self._began = self._alive = self._last_poll = time.monotonic()
        self._halted_since: float | None = None
        self._beat, self._notice = Beat(), FIRST_NOTICE

    def until_ended(self) -> str:
        """Why the process must be ended; "" when it ended by itself."""
        poll = SHORTEST_POLL
        while True:
            try:
                self._process.wait(poll)
                return ""
            except subprocess.TimeoutExpired:
                poll = min(2 * poll, LONGEST_POLL)
            if why := self._look(time.monotonic()):
                return why

    def _look(self, now: float) -> str:
        if (away := now - self._last_poll) > 10 * LONGEST_POLL:  # we were stopped ourselves, or the machine slept
            self._alive += away
            self._began += away
        self._last_poll = now
        if (beat := read(self._pulse)).steps > self._beat.steps:
            self._beat, self._alive, self._notice = beat, now, FIRST_NOTICE
            self._watch.on_beat(beat)
        state = _state(self._process.pid)
        self._halted_since = (self._halted_since or now) if state in HALTED else None
        silent = now - self._alive
        if silent >= self._notice and silent < self._watch.patience:
            self._notice *= 2
            what = HALTED.get(state, f"last: {self._beat}")
            self._watch.on_silence(f"no progress for {silent:.0f} s ({what}); ended at {self._watch.patience:.0f} s")
        return self._verdict(now, silent, state)

    def _verdict(self, now: float, silent: float, state: str) -> str:
        watch, doing = self._watch, f"(last: {self._beat})"
        if self._beat.what == ANSWERED and silent > min(EXIT_GRACE, watch.patience):
            return f"wrote its answer and did not end within {silent:.0f} s"
        if self._halted_since is not None and now - self._halted_since > min(HALTED_GRACE, watch.patience):
            return f"made no progress for {silent:.0f} s: {HALTED[state]} {doing}"
        if silent > watch.patience:
            return f"made no progress for {silent:.0f} s {doing}"
        if watch.timeout is not None and now - self._began > watch.timeout:
            return f"gave no answer within {watch.timeout:g} s {doing}"
        for path, limit in self._limits.items():
            if (size := _size(path)) > limit:
                return f"wrote {size} bytes to {path.name}, more than the {limit} it may {doing}"
        return ""


def _state(process: int) -> str:
    """The state letter of a process; "" where the system does not tell (proc_pid_stat(5))."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            return file.read(4096).rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _size(path: Path) -> int:
    """Of the file, finished or still under its temporary name (arrays.write_each)."""
    sizes = [0]
    for name in (path, path.with_name(f"{path.name}.partial")):
        try:
            sizes.append(name.stat().st_size)
        except OSError:
            continue
    return max(sizes)


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4 * LOG_TAIL))
        return file.read().decode("utf-8", errors="replace")[-LOG_TAIL:]
