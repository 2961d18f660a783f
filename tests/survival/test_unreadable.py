"""A file or folder that may not be read: one clear message, exit code 2. Also for root, who gives up its privilege."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.survival.place import BAD, Place, check_message, partials, run
from tests.survival.test_special_files import CASES

CAPABILITIES_3 = 0x20080522  # linux/capability.h: version of the two structures below
PASSES_OVER = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


@contextmanager
def permissions_hold() -> Iterator[None]:
    """This thread, and what it forks, may read what the mode of a file says, even as root (man 2 capset)."""
    if os.geteuid():
        yield
        return
    if sys.platform != "linux":
        pytest.skip("root passes over permissions here")
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(CAPABILITIES_3, 0), (ctypes.c_uint32 * 6)()  # effective, permitted, … twice
    assert libc.capget(header, sets) == 0, os.strerror(ctypes.get_errno())
    before = sets[0]
    sets[0] = before & ~PASSES_OVER
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        sets[0] = before
        assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


@pytest.mark.parametrize(
    ("name", "command"), CASES, ids=lambda value: value if isinstance(value, str) else " ".join(value[:2])
)
def test_one_clear_message(
    name: str, command: tuple[str, ...], place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    path = place / name
    mode = path.stat().st_mode
    path.chmod(0)
    with permissions_hold():
        with pytest.raises(PermissionError):
            path.open("rb") if path.is_file() else os.listdir(path)
        code = run(*command)
    path.chmod(mode)
    captured = capsys.readouterr()
    check_message(captured.err, (path.name, "Permission denied"))
    assert captured.err.count("error:") == 1, captured.err
    assert code == BAD, captured.err
    assert not (place / "new").exists()
    assert partials(place.path) == []
