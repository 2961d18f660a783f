"""The manifest: commit mark, integrity, provenance."""

import json
import shutil
from pathlib import Path

import pytest

from qalora_export.checkpoint.manifest import (
    MANIFEST,
    Parent,
    parent_of,
    read_manifest,
    verify_manifest,
    write_manifest,
)
from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.safety import sha256_file


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
