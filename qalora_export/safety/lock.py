"""One writer per folder. The lock belongs to the process, so a kill releases it and nothing is left to clean up."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from qalora_export.errors import InputError

LOCK = ".lock"


@contextlib.contextmanager
def single_writer(folder: Path) -> Iterator[None]:
    """Hold `folder`/.lock while the block runs. Raises InputError when another process holds it."""
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                "another run is writing here", where=folder, fix="wait until it has ended, or choose another --out"
            ) from error
        yield
