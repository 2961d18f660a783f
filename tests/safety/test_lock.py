"""One writer per output, on file systems with flock and without."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qalora_export.errors import InputError
from qalora_export.safety.lock import OWNER, single_writer


@pytest.fixture(params=["flock", "no flock"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "no flock":

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "flock", refuse)
    return str(request.param)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_a_thread(target: Path) -> str:
    """What another thread is told that wants the lock."""
    told = []

    def take() -> None:
        try:
            with single_writer(target):
                told.append("taken")
        except InputError as error:
            told.append(str(error))

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return told[0]


def test_a_second_writer_is_refused_at_once_and_nothing_is_left(tmp_path: Path, file_system: str) -> None:
    out = tmp_path / "out"
    with single_writer(out) as outermost:
        assert outermost
        assert "another command is writing" in in_a_thread(out)
        assert in_a_thread(tmp_path / "other") == "taken"
    assert in_a_thread(out) == "taken"
    assert names(tmp_path) == []


def test_a_stage_and_its_writer_claim_the_same_output(tmp_path: Path, file_system: str) -> None:
    with single_writer(tmp_path / "out"):
        with single_writer(tmp_path / "out") as outermost:
            assert not outermost
        assert "another command" in in_a_thread(tmp_path / "out")


def test_one_output_by_two_spellings(tmp_path: Path, file_system: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with single_writer(tmp_path / "folder" / "out"):
        assert "another command" in in_a_thread(tmp_path / "link" / "out")
        assert "another command" in in_a_thread(tmp_path / "folder" / ".." / "folder" / "out")


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def owner_file(out: Path, **changes: object) -> Path:
    """As a process of this machine leaves it that was killed while it had the lock."""
    from qalora_export.safety.lock import _identity

    path = out.with_name(f".{out.name}{OWNER}")
    path.write_text(json.dumps(_identity(os.getpid()) | changes))
    return path


@pytest.mark.parametrize("file_system", ["no flock"], indirect=True)
def test_without_flock_a_dead_owner_is_replaced(tmp_path: Path, file_system: str) -> None:
    owner_file(tmp_path / "out", pid=ended_process())
    with single_writer(tmp_path / "out"):
        assert "another command" in in_a_thread(tmp_path / "out")
    assert names(tmp_path) == []


@pytest.mark.parametrize("file_system", ["no flock"], indirect=True)
def test_without_flock_a_number_that_another_process_has_now_is_no_owner(tmp_path: Path, file_system: str) -> None:
    owner_file(tmp_path / "out", started="1")
    if sys.platform == "linux":
        with single_writer(tmp_path / "out"):
            pass


@pytest.mark.parametrize("file_system", ["no flock"], indirect=True)
@pytest.mark.parametrize("changes", [{"host": "elsewhere"}, {"system": "another boot"}, {}], ids=str)
def test_without_flock_an_owner_that_may_live_is_named(
    tmp_path: Path, file_system: str, changes: dict[str, object]
) -> None:
    path = owner_file(tmp_path / "out", **changes)
    with pytest.raises(InputError, match=r"qalora-owner.*delete it"), single_writer(tmp_path / "out"):
        pytest.fail("two writers")
    assert path.exists()


def test_many_processes_never_write_together(tmp_path: Path) -> None:
    """Each that gets the lock finds no mark of another, makes its own and takes it away again."""
    code = """
import sys, time
from pathlib import Path
from qalora_export.errors import InputError
from qalora_export.safety import exclusive
out, mark, got = Path(sys.argv[1]) / "out", Path(sys.argv[1]) / "mark", 0
end = time.monotonic() + 1.0
while time.monotonic() < end:
    try:
        with exclusive(out):
            mark.mkdir()
            mark.rmdir()
            got += 1
    except InputError as error:
        assert "another command" in str(error), error
print(got)
"""
    rivals = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    counts = [int(rival.communicate()[0]) for rival in rivals]
    assert [rival.returncode for rival in rivals] == [0] * 4
    assert sum(counts) > 4
    assert names(tmp_path) == []
