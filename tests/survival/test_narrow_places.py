"""Killed before every single change on disk, one by one: what is found afterwards is old or new, never less."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from qalora_export.errors import InputError
from qalora_export.qalora.training import folder as training_folder
from qalora_export.safety import atomic_directory, atomic_file, sweep
from tests.survival.changes import count_changes

RUN = {"settings": {"rank": 4}, "base": "abc"}


def killed_at(change: int, folder: Path, action: Callable[[], None]) -> bool:
    """Run `action` in a forked process that dies before its n-th change; False when it ended first."""
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            count_changes(folder.with_name("changes"), change)
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def every_place(
    tmp_path: Path, prepare: Callable[[Path], None], action: Callable[[Path], None], check: Callable[[Path], None]
) -> int:
    """prepare, action killed before change 1, 2, 3, …, check; returns how many places there were."""
    place = 0
    while True:
        place += 1
        folder = tmp_path / "work"
        folder.mkdir()
        prepare(folder)
        killed = killed_at(place, folder, lambda folder=folder: action(folder))
        check(folder)
        shutil.rmtree(folder)
        if not killed:
            return place - 1


def write(folder: Path, text: str) -> None:
    with atomic_directory(folder / "out", force=True) as partial:
        for name in ("a", "b"):
            (partial / name).write_text(text)


def test_a_replaced_folder_is_old_or_new_at_every_moment(tmp_path: Path) -> None:
    def check(folder: Path) -> None:
        with pytest.raises(InputError, match="exists already"), atomic_directory(folder / "out"):
            pytest.fail("refused: a kill between the two renames must not lose the old folder")
        texts = {path.read_text() for path in (folder / "out").iterdir()}
        assert texts in ({"old"}, {"new"}) and len(list((folder / "out").iterdir())) == 2
        write(folder, "third")
        assert sorted(path.name for path in folder.iterdir()) == ["out"]

    assert every_place(tmp_path, lambda f: write(f, "old"), lambda f: write(f, "new"), check) >= 6


def test_a_replaced_file_is_old_or_new_at_every_moment(tmp_path: Path) -> None:
    def prepare(folder: Path) -> None:
        (folder / "out").write_text("old")

    def action(folder: Path) -> None:
        with atomic_file(folder / "out", force=True) as partial:
            partial.write_text("new")

    def check(folder: Path) -> None:
        assert (folder / "out").read_text() in ("old", "new")
        sweep(folder)
        assert [path.name for path in folder.iterdir()] == ["out"]

    assert every_place(tmp_path, prepare, action, check) >= 2


def test_a_replaced_folder_is_found_again_by_the_next_writer_of_its_neighbour(tmp_path: Path) -> None:
    def check(folder: Path) -> None:
        with atomic_file(folder / "neighbour") as partial:
            partial.write_text("x")
        assert sorted(path.name for path in folder.iterdir()) == ["neighbour", "out"]

    assert every_place(tmp_path, lambda f: write(f, "old"), lambda f: write(f, "new"), check) >= 6


def checkpoints(folder: Path) -> None:
    training_folder.prepare(folder / "t", RUN, resume=True, force=False)
    for step in (3, 6):
        path = training_folder.checkpoint(folder / "t", step)
        path.mkdir()
        (path / training_folder.ADAPTER).write_bytes(b"x" * step)
        training_folder.mark_complete(path)


def test_a_training_folder_can_be_prepared_again_after_every_kill(tmp_path: Path) -> None:
    """A folder without its run.json would be taken for somebody else's and refused for ever."""

    def action(folder: Path) -> None:
        training_folder.prepare(folder / "t", RUN | {"base": "def"}, resume=False, force=True)

    def check(folder: Path) -> None:
        training_folder.prepare(folder / "t", RUN, resume=True, force=True)

    assert every_place(tmp_path, checkpoints, action, check) >= 8


def test_the_last_checkpoint_is_deleted_before_the_best(tmp_path: Path) -> None:
    """Step 6 says that step 3 was the best: as long as 6 is complete, 3 must be, too."""

    def check(folder: Path) -> None:
        if training_folder.last_checkpoint(folder / "t") == training_folder.checkpoint(folder / "t", 6):
            assert training_folder.is_complete(training_folder.checkpoint(folder / "t", 3))

    assert every_place(tmp_path, checkpoints, lambda f: training_folder.keep_only(f / "t", ()), check) >= 4


def test_one_writer_at_a_time_and_a_kill_frees_the_folder(tmp_path: Path) -> None:
    assert killed_at(2, tmp_path / "work", lambda: write(tmp_path, "half"))
    assert [path.suffix for path in tmp_path.iterdir() if path.name != "changes"] == [".qalora-lock"]
    write(tmp_path, "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changes", "out"]
