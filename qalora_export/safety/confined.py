"""Calls whose input may make them loop or grow without end, in a process that the system stops.

Chat templates and regular expressions are code that comes with a model. No check of ours tells beforehand how long
they run (nested loops, 'a' * 10**9, backtracking), and inside one C call no alarm of Python's is heard. So they run in
a forked process with a limit on memory and on CPU time, which a busy or sleeping machine does not use up.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import resource
import signal
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

SECONDS = 4.0  # of CPU time for one call
MEMORY = 512 * 2**20  # bytes above what the process has when it starts
PER_SECOND = 100_000  # bytes of a question for which a call may take one second more
LARGEST = 64 * 2**20  # bytes of an answer
_inside = False  # whether this process is a confined one


def is_confined() -> bool:
    """Whether this process is one in which a Confined answers."""
    return _inside


class OutOfBoundsError(Exception):
    """The call took too long or too much, or crashed its process; says which."""


class FailedError(Exception):
    """The call raised: the name of the exception and its text."""


class Confined:
    """`function` in a process of its own: JSON in, JSON out, one call after the other.

    The process starts with the first call, sees memory as it was then, serves until a call breaks a limit and ends
    with this object or with the process that made it. seconds: of CPU time, beside those that a long question adds.
    Raises OutOfBoundsError and FailedError; inside another confined process, whose limits hold already, whatever
    `function` raises.
    """

    def __init__(self, function: Callable[..., Any], *, seconds: float | None = None, memory: int = MEMORY) -> None:
        self._function, self._seconds, self._memory = function, seconds or SECONDS, memory
        self._child: _Child | None = None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if _inside:
            return self._function(*arguments, **options)
        if self._child is None:
            self._child = _Child(self._function, self._seconds, self._memory)
        try:
            answer = self._child.ask([arguments, options])
        except BaseException:  # an interrupt leaves half an answer in the pipe
            self.close()
            raise
        if answer is None:
            status, self._child = int(self._child.end() or 0), None
            raise OutOfBoundsError(_explained(status, self._seconds))
        if "limit" in answer:
            raise OutOfBoundsError(answer["limit"])
        if "error" in answer:
            raise FailedError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        """End the process; the next call starts a new one."""
        if self._child is not None:
            self._child.end()
            self._child = None


class ConfinedTogether:
    """Several functions in one such process, for a fork copies the page tables of all that its parent has in memory.

    The process ends with whichever call breaks a limit; the next call of any of them starts a new one.
    """

    def __init__(self) -> None:
        self._functions: list[Callable[..., Any]] = []
        self._confined = Confined(self._call)

    def add(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, confined; a process that runs already does not know it and ends."""
        number = len(self._functions)
        self._functions.append(function)
        self.close()
        return lambda *arguments, **options: self._confined(number, arguments, options)

    def close(self) -> None:
        """As Confined.close."""
        self._confined.close()

    def _call(self, number: int, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
        return self._functions[number](*arguments, **options)


class _Child:
    """The forked process and the two pipes to it; a line is one message."""

    def __init__(self, function: Callable[..., Any], seconds: float, memory: int) -> None:
        asked, ask = os.pipe()
        answer, answered = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads: the child uses none and only runs Python
            self.pid = os.fork()
        if self.pid == 0:
            _serve(function, seconds, memory, asked, answered)
        os.close(asked)
        os.close(answered)
        self.ask_pipe, self.answer_pipe = os.fdopen(ask, "wb", 0), os.fdopen(answer, "rb")
        self.end = weakref.finalize(self, _end, self.pid, self.ask_pipe, self.answer_pipe)

    def ask(self, message: Any) -> dict[str, Any] | None:
        """None when the process has ended instead."""
        try:
            _write_all(self.ask_pipe.fileno(), json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            return None
        line = self.answer_pipe.readline()
        return json.loads(line) if line.endswith(b"\n") else None


def _end(pid: int, ask: IO[bytes], answer: IO[bytes]) -> int:
    ask.close()
    answer.close()
    finished, status = os.waitpid(pid, os.WNOHANG)
    if not finished:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def _serve(function: Callable[..., Any], seconds: float, memory: int, asked: int, answered: int) -> NoReturn:
    """In the child: answer until the parent is gone."""
    global _inside
    try:
        _inside = True
        gc.freeze()  # a collection would write to every object of the parent and so copy all of its memory
        _close_all_but(asked, answered)
        _limit(memory)
        with os.fdopen(asked, "rb") as questions:
            for line in questions:
                allowed = seconds + len(line) / PER_SECOND
                signal.setitimer(signal.ITIMER_PROF, allowed)  # its signal ends the process, whatever it is doing
                answer = _answer(function, line)
                signal.setitimer(signal.ITIMER_PROF, 0)
                _write_all(answered, answer)
    finally:
        os._exit(0)


def _close_all_but(*kept: int) -> None:
    """What the parent has open is not ours: a copy would keep its locks held and its pipes without an end."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):  # a panic of a Rust library prints its stack; the answer says what it was
        os.dup2(null, standard)
    begin = 3
    for descriptor in sorted(kept):
        os.closerange(begin, descriptor)
        begin = descriptor + 1
    os.closerange(begin, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _limit(memory: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive the fork
    faulthandler.disable()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # sent to the whole group: the parent decides
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statm = Path("/proc/self/statm")
    if statm.exists():  # elsewhere nothing tells the size of the address space; time still ends what grows
        pages = int(statm.read_text().split()[0])
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        wanted = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (wanted if hard < 0 else min(wanted, hard), hard))


def _answer(function: Callable[..., Any], line: bytes) -> bytes:
    try:
        arguments, options = json.loads(line)
        raw = json.dumps({"result": function(*arguments, **options)}).encode()
        answer = raw if len(raw) <= LARGEST else json.dumps({"limit": f"its answer has {len(raw):,} bytes"}).encode()
    except MemoryError:
        answer = b'{"limit": "it asked for more memory than a call may take"}'
    except BaseException as error:
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        answer = json.dumps({"error": said[:4000]}).encode()
    return answer + b"\n"


def _write_all(descriptor: int, raw: bytes) -> None:
    view = memoryview(raw)
    while view:
        view = view[os.write(descriptor, view) :]


def _explained(status: int, seconds: float) -> str:
    if status == -signal.SIGPROF:
        return f"it took more than {seconds:g} s"
    if status < 0:
        return f"its process was ended by {signal.Signals(-status).name}"
    return f"its process ended by itself, with {status}"
