"""SIGINT, SIGTERM and SIGHUP end a command: what is unfinished goes, one line is said, the exit code is 128 + signal.

The signal is raised in the main thread as an exception, so every `finally` runs: files go, runners end, locks open. A
thread watches that this does not take longer than GRACE: the main thread may be inside a long call of a library, where
no exception reaches it, or a library may swallow it. Further signals change nothing. A signal that was ignored when
the command began (nohup) stays ignored. Only the command line installs handlers, never the library.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from qalora_export.safety import abandon

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 10.0  # seconds between the signal and the end of the process
SOON = 0.05  # seconds until a signal that was lost is raised again
NO_SIGNAL = 0
SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides it


class Interrupted(BaseException):
    """Raised in the main thread by a signal. No KeyboardInterrupt: the parser of arguments answers to that itself."""


class Ending:
    """by: the first signal that came; None while the command goes on."""

    def __init__(self) -> None:
        self.by: signal.Signals | None = None
        self._raised, self._ended = False, threading.Event()

    def handle(self, number: int, _: FrameType | None) -> None:
        self.by = self.by or signal.Signals(number)
        if not self._raised:
            self._raised = True
            raise Interrupted(self.by.name)

    def unless_swallowed(
        self, hook: Callable[[sys.UnraisableHookArgs], Any]
    ) -> Callable[[sys.UnraisableHookArgs], Any]:
        """A hook for exceptions that Python drops, in what runs around a fork, say, or in __del__: ours comes again."""

        def unraisable(dropped: sys.UnraisableHookArgs) -> None:
            if self.by is None or not issubclass(dropped.exc_type, Interrupted):
                hook(dropped)
                return
            self._raised = False
            signal.signal(signal.SIGALRM, self.handle)
            signal.setitimer(signal.ITIMER_REAL, SOON)  # what is raised in here would be dropped too

        return unraisable

    def watch(self, wakeups: int) -> None:
        """In a thread: end the process GRACE after its first signal, whatever the main thread does."""
        while (number := os.read(wakeups, 1)[0]) not in ENDING:  # written by the C handler, at once
            if number == NO_SIGNAL:
                return
        self.by = self.by or signal.Signals(number)
        if not self._ended.wait(GRACE):
            abandon()
            self.say()
            os._exit(128 + self.by)

    def over(self) -> None:
        """The main thread has done it."""
        self._ended.set()

    def say(self) -> None:
        assert self.by is not None
        line = f"interrupted by {self.by.name}; finished stages are kept, run the same command again to go on\n"
        with contextlib.suppress(OSError):  # the terminal may be what went away
            os.write(2, (SHOW_CURSOR if os.isatty(2) else b"") + line.encode())


@contextlib.contextmanager
def ends_on_signals() -> Iterator[Ending]:
    """Inside the block a signal ends the command: whatever the block then does, SystemExit leaves it."""
    ending = Ending()
    with _handled(ending):
        try:
            yield ending
        finally:
            if ending.by is not None:
                abandon()
                ending.say()
                raise SystemExit(128 + ending.by)


@contextlib.contextmanager
def _handled(ending: Ending) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only there Python lets handlers be set
        yield
        return
    ours = [number for number in ENDING if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)]
    wakeups, woken = os.pipe()
    os.set_blocking(woken, False)
    watcher = threading.Thread(target=ending.watch, args=(wakeups,), name="signals", daemon=True)
    watcher.start()
    told = signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    before = {number: signal.signal(number, ending.handle) for number in ours}
    hook, sys.unraisablehook = sys.unraisablehook, ending.unless_swallowed(sys.unraisablehook)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if ending.by is None else signal.SIG_IGN)  # the process is about to end
        sys.unraisablehook = hook
        signal.set_wakeup_fd(told)
        ending.over()
        os.write(woken, bytes([NO_SIGNAL]))
        watcher.join()
        for end in (wakeups, woken):
            os.close(end)
