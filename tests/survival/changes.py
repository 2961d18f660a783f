"""Count what a process changes in the file system, and kill it, or send it a signal, before a chosen change."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


def count_changes(counter: Path, place: int | None, action: Callable[[], None] | None = None) -> None:
    """Audit every change of the file system in this process; before the one numbered `place` do `action`, by default
    SIGKILL to the group.
    """
    made = 0
    record = os.open(counter, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal made
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event not in CHANGES and not writes:
            return
        made += 1
        os.pwrite(record, b"%d" % made, 0)
        if made == place:
            (action or _die)()

    sys.addaudithook(hook)


def _die() -> None:
    os.killpg(os.getpid(), signal.SIGKILL)


def send(number: int, times: int) -> None:
    """A signal to this process, several times from a thread: the later ones arrive while it cleans up."""

    def repeat() -> None:
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(0.002)

    if times == 1:
        os.kill(os.getpid(), number)
    else:
        threading.Thread(target=repeat, daemon=True).start()
