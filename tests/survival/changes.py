"""Count what a process changes in the file system, and kill it before a chosen change."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


def count_changes(counter: Path, die_at: int | None) -> None:
    """Audit every change of the file system in this process; SIGKILL it before the one numbered die_at."""
    made = 0
    record = os.open(counter, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal made
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event not in CHANGES and not writes:
            return
        made += 1
        os.pwrite(record, b"%d" % made, 0)
        if made == die_at:
            os.killpg(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
