"""The manifest: commit mark, integrity, provenance."""

import json
import shutil
import threading
from pathlib import Path

import pytest

from qalora_export.checkpoint import manifest
from qalora_export.checkpoint.manifest import (
    MANIFEST,
    Parent,
    intact_meanwhile,
    parent_of,
    read_manifest,
    verify_manifest,
    write_manifest,
)
from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.safety import sha256_file
from qalora_export.safety.hashing import Stopped


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "artifact"
    (path / "sub").mkdir(parents=True)
    (path / "a.txt").write_text("alpha")
    (path / "sub" / "b.txt").write_text("beta")
    write_manifest(path, "merged", tensors={}, parents=[Parent("base", "b", "0" * 64)], settings={"x": 1})
    return path


def test_lists_every_file_and_what_it_came_from(folder: Path) -> None:
    content = read_manifest(folder)
    assert set(content["files"]) == {"a.txt", "sub/b.txt"}
    assert content["files"]["a.txt"] == {"bytes": 5, "sha256": sha256_file(folder / "a.txt")}
    assert (content["kind"], content["settings"]) == ("merged", {"x": 1})
    assert content["parents"] == [{"role": "base", "name": "b", "sha256": "0" * 64}]
    assert verify_manifest(folder) == []


DAMAGE = {
    "changed": lambda f: (f / "a.txt").write_text("alphb"),
    "truncated": lambda f: (f / "a.txt").write_text("alph"),
    "missing": lambda f: (f / "a.txt").unlink(),
    "a link": lambda f: ((f / "a.txt").rename(f.parent / "a"), (f / "a.txt").symlink_to(f.parent / "a")),
}


@pytest.mark.parametrize("case", [case for case in DAMAGE if case != "a link"])
def test_verification_names_the_damaged_file(folder: Path, case: str) -> None:
    DAMAGE[case](folder)
    assert verify_manifest(folder) == ["a.txt"]


def test_verification_refuses_links(folder: Path) -> None:
    DAMAGE["a link"](folder)
    with pytest.raises(UnsafeInputError, match="symbolic link"):
        verify_manifest(folder)


def test_names_in_a_manifest_cannot_escape(folder: Path) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    content["files"]["../outside"] = {"bytes": 1, "sha256": "0"}
    (folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(UnsafeInputError, match="outside its folder"):
        verify_manifest(folder)


@pytest.fixture
def large(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder, in which a.txt counts as a large file."""
    monkeypatch.setattr(manifest, "LARGE", 4)
    return folder


def test_a_large_file_is_checked_beside_the_work(large: Path) -> None:
    with intact_meanwhile(large, "the base") as require:
        require()
    begun = []
    (large / "a.txt").write_text("alphb")
    with pytest.raises(InputError, match=r"the base differs.*a\.txt"), intact_meanwhile(large, "the base"):
        begun.append("the work")
    with pytest.raises(InputError, match=r"a\.txt"), intact_meanwhile(large, "the base") as require:
        require()
        begun.append("what may only be kept when all is right")
    assert begun == ["the work"]


def test_damage_is_named_instead_of_what_it_leads_to(large: Path) -> None:
    (large / "a.txt").write_text("alphb")
    with pytest.raises(InputError, match="differs from its manifest"), intact_meanwhile(large, "the base"):
        raise InputError("a scale is NaN")
    (large / "a.txt").write_text("alpha")
    with pytest.raises(InputError, match="a scale is NaN"), intact_meanwhile(large, "the base"):
        raise InputError("a scale is NaN")


def test_small_files_are_checked_before_the_work(folder: Path) -> None:
    (folder / "a.txt").write_text("alphb")
    with pytest.raises(InputError, match=r"a\.txt"), intact_meanwhile(folder, "the base"):
        pytest.fail("the work began")


def test_a_signal_does_not_wait_for_the_check(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()

    def endless(_: Path, *, stop: threading.Event) -> str:
        begun.set()
        assert stop.wait(60)
        raise Stopped

    monkeypatch.setattr(manifest, "sha256_file", endless)
    with pytest.raises(KeyboardInterrupt), intact_meanwhile(large, "the base"):
        assert begun.wait(60)
        raise KeyboardInterrupt


def test_a_folder_without_manifest_has_nothing_to_be_held_against(tmp_path: Path) -> None:
    with intact_meanwhile(tmp_path, "the base") as require:
        require()


def test_no_manifest_means_not_finished(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did not finish"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("raw", ["[]", "{}", '{"format": "other/1", "files": {}}', '{"format": "qalora-manifest/1"}'])
def test_a_foreign_manifest_is_refused(tmp_path: Path, raw: str) -> None:
    (tmp_path / MANIFEST).write_text(raw)
    with pytest.raises(UnsafeInputError, match="not one of ours"):
        read_manifest(tmp_path)


def test_parent_of_follows_content_not_place(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    left, right = parent_of(folder, "base"), parent_of(tmp_path / "copy", "base")
    assert left.sha256 == right.sha256 == sha256_file(folder / MANIFEST)
    assert (left.name, right.name, left.role) == ("artifact", "copy", "base")


def test_parent_of_a_plain_model_folder_hashes_its_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = parent_of(tmp_path, "source").sha256
    (tmp_path / "notes.txt").write_text("ignored")
    assert parent_of(tmp_path, "source").sha256 == before
    (tmp_path / "model.safetensors").write_bytes(b"weightz")
    assert parent_of(tmp_path, "source").sha256 != before


def test_holds_no_time_and_no_absolute_path(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    assert str(folder) not in text
    before = text
    write_manifest(folder, "merged", tensors={}, parents=[Parent("base", "b", "0" * 64)], settings={"x": 1})
    assert (folder / MANIFEST).read_text() == before
