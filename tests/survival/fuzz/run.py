"""Runs cases in forked children: a case is a target and a number, and always the same damage.

A child has everything imported, works through a batch in a folder of its own and reports each case by a line. It can
be killed by a case (a signal, memory) or by us (no answer): the parent knows which case that was and goes on behind it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from qalora_export.safety import confined
from tests.survival.fuzz.commands import Misbehaved, Refused
from tests.survival.fuzz.targets import Target

SECONDS = 10  # of CPU time for one case
PATIENCE = 40  # seconds for one case on a busy machine
GRACE = 20  # before a case that does not even hear the alarm is killed
BASE_MEMORY, TIMES = 256 << 20, 10  # bytes that a case may take: BASE + TIMES × the file
HARD_LIMIT = 2 << 30  # address space above what the process has: what asks for more gets MemoryError
BATCH = 400  # cases of a child, after which its memory is given back
MOST_CHANGES = 3
ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Outcome:
    """kind: "accepted", "refused", or what must not be: "traceback", "hang", "memory", "killed", "damage accepted"."""

    kind: str
    signature: str = ""
    detail: str = ""

    @property
    def good(self) -> bool:
        return self.kind in ("accepted", "refused", "unchanged")


@dataclass
class Tally:
    counts: Counter[str] = field(default_factory=Counter)
    findings: dict[str, tuple[int, str, Outcome]] = field(default_factory=dict)  # signature -> times, case, outcome

    def add(self, target: Target, number: int, outcome: Outcome) -> None:
        self.counts[outcome.kind] += 1
        if not outcome.good:
            key = f"{outcome.kind}: {outcome.signature}"
            times, case, first = self.findings.get(key, (0, f"--target {target.name!r} --case {number}", outcome))
            self.findings[key] = (times + 1, case, first)


def damaged(
    target: Target, raw: bytes, seed: int, number: int, only: set[int] | None = None
) -> tuple[bytes, list[str]]:
    """The damage of one case and what was done; `only` some of its changes, to find which of them matters."""
    random = Random(f"{seed}/{target.name}/{number}")
    said = []
    for change in range(random.choice((1, 1, 1, 2, MOST_CHANGES))):
        mutator, state = random.choice(target.mutators), random.getrandbits(64)
        if only is None or change in only:
            raw, what = mutator(Random(state), raw)
            said.append(what)
    return raw, said


def run_case(target: Target, folder: Path, raw: bytes) -> Outcome:
    """Put `raw` in place of the target's file, read, put the good file back."""
    path = folder / target.file
    beside = {other: other.read_bytes() for other in path.parent.iterdir() if other.is_file()} if target.fragile else {}
    before, began = path.read_bytes() if path.exists() else b"", time.process_time()
    path.write_bytes(raw)
    try:
        with _bounded() as used:
            outcome = _read(target, folder, changed=raw != before)
        if outcome.good and time.process_time() - began > SECONDS:
            outcome = Outcome("hang", target.name, f"{time.process_time() - began:.1f} s of CPU time")
        if outcome.good and used[0] > BASE_MEMORY + TIMES * len(raw):
            outcome = Outcome("memory", target.name, f"{used[0] >> 20} MiB for {len(raw)} bytes")
    finally:
        if beside and not path.parent.exists():
            path.parent.mkdir(parents=True)
            for other, content in beside.items():
                other.write_bytes(content)
        path.write_bytes(before)
        _remove(folder / "new")
    return outcome


def _read(target: Target, folder: Path, *, changed: bool) -> Outcome:
    from qalora_runtimes.arrays import ProtocolError

    from qalora_export.errors import QaloraError, from_system

    try:
        target.read(folder)
    except QaloraError as error:
        if "out of memory" in error.what:
            return Outcome("memory", _place(error), str(error))
        return Outcome("refused", detail=str(error))
    except (ProtocolError, Refused) as error:
        return Outcome("refused", detail=str(error))
    except _Expired as error:
        return Outcome("hang", _place(error), traceback.format_exc())
    except MemoryError as error:
        return Outcome("memory", _place(error), traceback.format_exc())
    except Misbehaved as error:
        return Outcome("traceback", _last_frames(str(error)), str(error))
    except BaseException as error:
        if from_system(error) is not None:  # what the command line says in one sentence
            return Outcome("refused", detail=str(error))
        return Outcome("traceback", f"{type(error).__name__} {_place(error)}", traceback.format_exc())
    if not changed:
        return Outcome("unchanged")
    return Outcome("damage accepted", target.name) if target.sealed else Outcome("accepted")


class _Expired(BaseException):
    """The alarm of a case; no handler of `Exception` may swallow it."""


@contextlib.contextmanager
def _bounded() -> Iterator[list[int]]:
    """Alarm and address space for one case; leaves in [0] by how many bytes it raised the resident memory's peak."""

    def expired(*_: object) -> None:
        raise _Expired(f"no answer in {PATIENCE} s")

    used = [0]
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    handler = signal.signal(signal.SIGALRM, expired)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = _status("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + HARD_LIMIT, hard))
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield used
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, handler)
        used[0] = _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _place(error: BaseException) -> str:
    """The last frame inside this repository."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        f
        for f in frames
        if f.filename.startswith(str(ROOT)) and "/.venv/" not in f.filename and "/tests/" not in f.filename
    ]
    return " ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in ours[-1:]) or "outside"


def _last_frames(said: str) -> str:
    lines = [line.strip() for line in said.splitlines()]
    ours = [line for line in lines if line.startswith("File") and "qalora_export" in line and "cli/main" not in line]
    ends = [line for line in lines if line and line[0].isalpha() and ("Error" in line or "Exception" in line)]
    return f"{(ends or [said[:80]])[-1][:100]} {(ours or [''])[-1]}"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------- children


def run_target(target: Target, seeds: Path, work: Path, numbers: range, seed: int, tally: Tally) -> None:
    """Cases `numbers` of a target, in children of at most BATCH cases each."""
    next_one = numbers.start
    while next_one < numbers.stop:
        if not work.exists():
            shutil.copytree(seeds, work, symlinks=True)
        next_one = _run_child(target, work, range(next_one, min(next_one + BATCH, numbers.stop)), seed, tally)


def _run_child(target: Target, work: Path, numbers: range, seed: int, tally: Tally) -> int:
    """The number of the first case that is still to do."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _child(target, work, numbers, seed, writing)
    os.close(writing)
    done, killed = numbers.start, False
    with os.fdopen(reading, "rb") as lines:
        while True:
            ready, _, _ = select.select([lines], [], [], PATIENCE + GRACE)
            if not ready:
                killed = True
                os.kill(child, signal.SIGKILL)
            line = lines.readline()
            if not line:
                break
            tally.add(target, done, Outcome(**json.loads(line)))
            done += 1
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if done < numbers.stop:
        shutil.rmtree(work)  # in whatever state it was left
        kind = (
            Outcome("hang", f"{target.name}, deaf to the alarm")
            if killed
            else Outcome("killed", f"{target.name}: {status}")
        )
        tally.add(target, done, kind)
        done += 1
    return done


def _child(target: Target, work: Path, numbers: range, seed: int, writing: int) -> None:
    """Never returns."""
    with contextlib.suppress(BaseException):
        _quiet(work)
        good = (work / target.file).read_bytes() if (work / target.file).exists() else b""
        for number in numbers:
            try:
                raw, said = damaged(target, good, seed, number)
            except Exception:
                _say(writing, Outcome("broken mutator", target.name, traceback.format_exc()))
                continue
            outcome = run_case(target, work, raw)
            detail = "" if outcome.good else f"{said}\n{outcome.detail}"
            _say(writing, Outcome(outcome.kind, outcome.signature, detail))
    os._exit(0)


def _say(writing: int, outcome: Outcome) -> None:
    answer = {"kind": outcome.kind, "signature": outcome.signature, "detail": outcome.detail[-6000:]}
    os.write(writing, json.dumps(answer).encode() + b"\n")


def _quiet(work: Path) -> None:
    """Nobody reads what a child prints; and what it writes need not survive a power cut."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    confined.SECONDS = 1.0  # a template that does not end costs each case that much
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    os.chdir(work)
