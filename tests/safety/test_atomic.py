"""Outputs are whole or absent."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from qalora_export.errors import InputError
from qalora_export.safety import atomic_directory, atomic_file, atomic_files, refuse_existing


class Stop(Exception):
    pass


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(folder: Path, text: str = "new") -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_text(text)


def test_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with atomic_directory(target) as partial:
        fill(partial)
        assert not target.exists()
    assert (target / "sub" / "file").read_text() == "new"
    assert listing(target.parent) == ["out"]


@pytest.mark.parametrize("failure", [Stop, KeyboardInterrupt, InputError("no")])
def test_directory_vanishes_on_any_exception(tmp_path: Path, failure: BaseException) -> None:
    with pytest.raises(BaseException) as caught, atomic_directory(tmp_path / "out") as partial:
        fill(partial)
        raise failure
    assert caught.type is (failure if isinstance(failure, type) else type(failure))
    assert listing(tmp_path) == []


def test_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(InputError, match=r"exists already.*--force"), atomic_directory(target):
        pytest.fail("the block must not run")
    assert listing(target) == ["old"]


def test_force_replaces_and_a_failure_keeps_the_old(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(Stop), atomic_directory(target, force=True) as partial:
        fill(partial)
        raise Stop
    assert listing(target) == ["old"]
    with atomic_directory(target, force=True) as partial:
        fill(partial)
    assert listing(target) == ["sub"]
    assert listing(tmp_path) == ["out"]


def test_force_replaces_a_file_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with atomic_directory(tmp_path / "out", force=True) as partial:
        fill(partial)
    assert (tmp_path / "out" / "sub" / "file").read_text() == "new"


def test_left_overs_of_a_killed_run_are_swept(tmp_path: Path) -> None:
    for name in (".out.qalora-1-0123abcd.partial", ".other.qalora-2-0123abcd.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("half")
    (tmp_path / ".other.qalora-lock").touch()
    with atomic_directory(tmp_path / "out") as partial:
        fill(partial)
    assert listing(tmp_path / "out") == ["sub"]
    assert listing(tmp_path) == ["out"]


def test_names_that_only_look_like_ours_stay(tmp_path: Path) -> None:
    names = [".out.partial", ".git.lock", "out.qalora-1-0123abcd.partial", ".out.qalora-x-0123abcd.partial"]
    for name in names:
        (tmp_path / name).touch()
    with atomic_file(tmp_path / "out") as partial:
        partial.write_text("whole")
    assert listing(tmp_path) == sorted([*names, "out"])


def test_an_old_folder_moved_aside_by_a_kill_is_put_back(tmp_path: Path) -> None:
    fill(tmp_path, "old")
    (tmp_path / "sub").rename(tmp_path / ".out.qalora-1-0123abcd.replaced.partial")
    with pytest.raises(InputError, match="exists already"), atomic_directory(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert (tmp_path / "out" / "file").read_text() == "old"
    assert listing(tmp_path) == ["out"]


def test_a_failure_between_the_two_renames_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    rename = Path.rename

    def refuse(self: Path, to: Path) -> Path:
        if to == tmp_path / "out" and not self.name.endswith(".replaced.partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(InputError, match="could not write"), atomic_directory(tmp_path / "out", force=True) as partial:
        fill(partial)
    assert listing(tmp_path) == ["out"] and listing(tmp_path / "out") == ["old"]


def test_what_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    """Programs that know nothing of our locks write, too."""
    with pytest.raises(InputError, match="exists already"), atomic_file(tmp_path / "out") as partial:
        partial.write_text("ours")
        (tmp_path / "out").write_text("theirs")
    assert (tmp_path / "out").read_text() == "theirs"


def test_folders_made_for_an_output_that_never_came_go_again(tmp_path: Path) -> None:
    with pytest.raises(Stop), atomic_file(tmp_path / "a" / "b" / "out"):
        raise Stop
    assert listing(tmp_path) == []


def test_dangling_symlink_counts_as_existing(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="exists already"):
        refuse_existing(tmp_path / "out", force=False)
    refuse_existing(tmp_path / "out", force=True)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_system_errors_become_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A full disk or read-only folder; raised by hand because the tests may run as root, whom permissions let pass."""

    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match=os.strerror(number)), atomic_directory(tmp_path / "out"):
        pytest.fail("the block must not run")
    monkeypatch.undo()
    with pytest.raises(InputError, match=os.strerror(number)), atomic_file(tmp_path / "file") as partial:
        partial.write_text("half")
        raise OSError(number, os.strerror(number), str(partial))
    assert listing(tmp_path) == []


def test_a_file_in_place_of_the_parent_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "parent").write_text("a file")
    with pytest.raises(InputError, match="could not write"), atomic_directory(tmp_path / "parent" / "out"):
        pytest.fail("the block must not run")


def test_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with pytest.raises(Stop), atomic_file(target) as partial:
        partial.write_text("half")
        raise Stop
    assert listing(tmp_path) == []
    with atomic_file(target) as partial:
        partial.write_text("whole")
        assert not target.exists()
    with pytest.raises(InputError, match="exists already"), atomic_file(target):
        pytest.fail("the block must not run")
    with atomic_file(target, force=True) as partial:
        partial.write_text("again")
    assert target.read_text() == "again"
    assert listing(tmp_path) == ["file"]


def test_missing_input_inside_the_block_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_directory(tmp_path / "out"):
        (tmp_path / "input").read_text()


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o077, 0o002, 0o027], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    assert os.umask(before) == request.param  # nothing here may set it


@pytest.mark.parametrize("made_with", [0o600, 0o777, 0o444, 0o644])
def test_every_file_gets_the_mode_of_a_new_file_and_folders_keep_theirs(
    tmp_path: Path, umask: int, made_with: int
) -> None:
    with atomic_file(tmp_path / "file") as partial:
        partial.write_text("whole")
        partial.chmod(made_with)
    with atomic_directory(tmp_path / "out") as partial:
        fill(partial)
        (partial / "sub" / "file").chmod(made_with)
        (partial / "sub").chmod(0o710)
    assert mode_of(tmp_path / "file") == mode_of(tmp_path / "out" / "sub" / "file") == 0o666 & ~umask
    assert mode_of(tmp_path / "out") == 0o777 & ~umask
    assert mode_of(tmp_path / "out" / "sub") == 0o710
    assert (listing(tmp_path), listing(tmp_path / "out")) == (["file", "out"], ["sub"])


def test_until_it_is_whole_a_file_is_no_more_readable_than_its_writer_made_it(tmp_path: Path) -> None:
    with pytest.raises(Stop), atomic_file(tmp_path / "file") as partial:
        partial.write_text("half")
        partial.chmod(0o600)
        assert mode_of(partial) == 0o600
        raise Stop
    assert listing(tmp_path) == []


def test_what_a_link_points_to_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "private").write_text("secret")
    (tmp_path / "private").chmod(0o600)
    with atomic_directory(tmp_path / "out") as partial:
        (partial / "link").symlink_to(tmp_path / "private")
    with atomic_file(tmp_path / "link") as partial:
        partial.symlink_to(tmp_path / "private")
    assert mode_of(tmp_path / "private") == 0o600


def test_a_link_planted_in_place_of_the_lock_is_refused(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("untouched")
    (tmp_path / ".file.qalora-lock").symlink_to(tmp_path / "victim")
    with pytest.raises(InputError, match="could not write"), atomic_file(tmp_path / "file"):
        pytest.fail("the block must not run")
    assert (tmp_path / "victim").read_text() == "untouched"


@pytest.mark.parametrize("old", [(), ("b",), ("a", "b", "c")])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("last", [1, 2, 3, 4])
def test_files_of_one_output_come_together(
    last: int, after: bool, old: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before or after the last rename that is made: none is there that was not there before."""
    for name in old:
        (tmp_path / name).write_text("old")
    replace, made = Path.replace, 0

    def interrupted(self: Path, to: Path) -> Path:
        nonlocal made
        made += 1
        if made == last and not after:
            raise KeyboardInterrupt
        done = replace(self, to)
        if made == last:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(Path, "replace", interrupted)
    try:
        with atomic_files([tmp_path / name for name in "abc"], force=True) as partials:
            for path in partials:
                path.write_text("new")
    except KeyboardInterrupt:
        assert listing(tmp_path) == sorted(old)
    else:
        assert last == 4
        assert [(tmp_path / name).read_text() for name in "abc"] == ["new"] * 3
        assert listing(tmp_path) == ["a", "b", "c"]
