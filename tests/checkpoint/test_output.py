"""What a stage may write over: artifacts of ours and nothing else, with --force or without."""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from qalora_export.checkpoint.manifest import write_manifest
from qalora_export.checkpoint.output import claim_output, foreign_files, write_signed
from qalora_export.errors import InputError
from qalora_export.safety import atomic_directory

COMMENT = ("# ", "")


def artifact(folder: Path) -> Path:
    """A folder as a stage leaves it."""
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text("alpha")
    (folder / "sub" / "b").write_text("beta")
    write_manifest(folder, "base", tensors={}, parents=[], settings={})
    return folder


def gguf(path: Path) -> None:
    path.write_bytes(b"GGUF" + b"\0" * 60 + b"qalora.version" + b"\0" * 60)


def beside(path: Path) -> None:
    """A file that the manifest beside it names."""
    path.write_bytes(b"anything")
    content = {"format": "qalora-manifest/1", "files": {path.name: {}}, "tensors": {}, "parents": []}
    path.with_name(f"{path.name}.manifest.json").write_text(json.dumps(content))


def zipped(path: Path, member: str, form: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, json.dumps({"format": form}))


OURS: dict[str, Callable[[Path], object]] = {
    "an artifact": artifact,
    "an empty folder": Path.mkdir,
    "a GGUF of ours": gguf,
    "a file with its manifest": beside,
    "a patch": lambda path: zipped(path, "patch.json", "qalora-patch/1"),
    "a damaged artifact": lambda path: (
        artifact(path),
        (path / "a").write_text("alphb"),
        (path / "sub" / "b").unlink(),
    ),
}
FOREIGN: dict[str, Callable[[Path], object]] = {
    "a text": lambda path: path.write_text("thesis"),
    "an empty file": Path.touch,
    "somebody's GGUF": lambda path: path.write_bytes(b"GGUF" + b"\0" * 100),
    "somebody's archive": lambda path: zipped(path, "notes.json", "qalora-patch/1"),
    "a patch of another tool": lambda path: zipped(path, "patch.json", "bsdiff"),
    "half an archive": lambda path: path.write_bytes(b"PK\x03\x04" + b"\0" * 60),
    "a folder": lambda path: (path.mkdir(), (path / "thesis").write_text("mine")),
    "an artifact with a foreign file": lambda path: (artifact(path), (path / "sub" / "thesis").write_text("mine")),
    "an artifact with a link": lambda path: (artifact(path), (path / "link").symlink_to(path.parent)),
    "an artifact with a pipe": lambda path: (artifact(path), os.mkfifo(path / "pipe")),
    "a manifest of another tool": lambda path: (path.mkdir(), (path / "manifest.json").write_text('{"files": {}}')),
    "a broken manifest": lambda path: (path.mkdir(), (path / "manifest.json").write_text("{")),
}


def snapshot(folder: Path) -> dict[str, bytes | str]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else oct(path.lstat().st_mode)
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("case", OURS)
def test_force_replaces_what_is_ours(tmp_path: Path, case: str) -> None:
    OURS[case](tmp_path / "out")
    with pytest.raises(InputError, match="exists already"), claim_output(tmp_path / "out", force=False):
        pytest.fail("the block must not run")
    with claim_output(tmp_path / "out", force=True):
        pass


@pytest.mark.parametrize("case", FOREIGN)
def test_force_never_replaces_what_is_not(tmp_path: Path, case: str) -> None:
    FOREIGN[case](tmp_path / "out")
    before = snapshot(tmp_path)
    refused = pytest.raises(InputError, match=r"only what this program made.*not ours: ")
    with refused, claim_output(tmp_path / "out", force=True):
        pytest.fail("the block must not run")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("meanwhile", ["a folder of the user's", "a file of the user's", "one more file", "nothing"])
def test_what_came_while_a_stage_ran_is_not_replaced_either(tmp_path: Path, meanwhile: str) -> None:
    """Hours may lie between the check at the start and the rename."""
    out = tmp_path / "out"
    if meanwhile in ("one more file", "nothing"):
        artifact(out)
    allowed = meanwhile == "nothing"
    refused = pytest.raises(InputError, match="only what this program made")
    with (
        contextlib.nullcontext() if allowed else refused,
        claim_output(out, force=True),
        atomic_directory(out, force=True) as folder,
    ):
        (folder / "new").write_text("ours")
        match meanwhile:
            case "a file of the user's":
                out.write_text("theirs")
            case "a folder of the user's" | "one more file":
                out.mkdir(exist_ok=True)
                (out / "notes.txt").write_text("theirs")
    kept = [path for path in (out, out / "notes.txt") if path.is_file()]
    assert [path.read_text() for path in kept] == ([] if allowed else ["theirs"])
    assert (out / "new").exists() == allowed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_foreign_files_are_listed_by_name(tmp_path: Path) -> None:
    artifact(tmp_path / "out")
    for name in ("x", "sub/y"):
        (tmp_path / "out" / name).touch()
    assert foreign_files(tmp_path / "out") == ["sub/y", "x"]


@pytest.mark.parametrize("force", [False, True])
def test_an_input_and_the_folders_around_and_inside_it_are_never_written(tmp_path: Path, force: bool) -> None:
    model = artifact(tmp_path / "x" / "model")
    (tmp_path / "link").symlink_to(model)
    os.link(model / "a", tmp_path / "same")
    for target, source, expected in (
        (model, model, "is an input"),
        (tmp_path / "x", model, "holds an input"),
        (tmp_path / "x", model / "a", "holds an input"),
        (model / "out", model, "inside an input"),
        (model / "deep" / "out", tmp_path / "link", "inside an input"),
        (tmp_path / "link" / "out", model, "inside an input"),
        (tmp_path / "same", model / "a", "is an input"),
        (tmp_path / "x" / ".." / "x" / "model", model, "is an input"),
    ):
        before = snapshot(tmp_path)
        with pytest.raises(InputError, match=expected), claim_output(target, force=force, inputs=[source, None]):
            pytest.fail("the block must not run")
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize("force", [False, True])
def test_links_and_the_places_people_stand_in_are_never_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    artifact(work / "here")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work / "here")
    artifact(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for target, expected in (
        (Path("/"), "working folder"),
        (Path("."), "working folder"),
        (work, "working folder"),
        (home, "home folder"),
        (tmp_path, "working folder"),
        (tmp_path / "link", "symbolic link"),
        (tmp_path / "dangling", "symbolic link"),
    ):
        with pytest.raises(InputError, match=expected), claim_output(target, force=force):
            pytest.fail("the block must not run")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere" / "a").exists()


def test_a_text_of_ours_is_written_again_and_an_edited_one_kept(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    for text in ("one\n", "two\n"):
        assert write_signed(path, text, comment=COMMENT) == path
        assert path.read_text().startswith(text)
    path.write_text(path.read_text().replace("two", "mine"))
    other = tmp_path / "README.qalora.md"
    for text in ("three\n", "four\n"):
        assert write_signed(path, text, comment=COMMENT) == other
    assert path.read_text().startswith("mine") and other.read_text().startswith("four")
    other.write_text("")
    assert write_signed(path, "five\n", comment=COMMENT) is None
    assert (path.read_text()[:4], other.read_text()) == ("mine", "")


def test_a_name_that_is_no_text_can_be_written_of(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    for _ in range(2):
        assert write_signed(path, "of \udcff\n", comment=COMMENT) == path
        assert path.read_text("utf-8").startswith("of \\udcff\n")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["new", "sub/new", "sub/deeper/new"])
def test_nothing_is_written_inside_an_artifact(tmp_path: Path, name: str, force: bool) -> None:
    """Its manifest names every file of the folder and would refute it."""
    inside = artifact(tmp_path / "out") / name
    with pytest.raises(InputError, match="inside an artifact"), claim_output(inside, force=force):
        pass
    assert not inside.exists()
    with claim_output(tmp_path / "beside", force=force):
        pass


def test_the_root_of_all_files_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "cwd", lambda: tmp_path / "gone")
    with pytest.raises(InputError, match="the place of"), claim_output(Path("/"), force=True):
        pass
