"""No name in a file leads out of its folder."""

import os
from pathlib import Path

import pytest

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.safety import inside


@pytest.mark.parametrize(
    "name", ["../secret", "sub/../../secret", "/etc/passwd", "", "a\\b", "a\0b", "C:/x", "file://x", "sub/.."]
)
def test_refuses_names_that_escape(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "sub").mkdir()
    with pytest.raises(UnsafeInputError):
        inside(folder, name)


def test_refuses_links(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    secret = tmp_path / "secret"
    secret.write_text("x")
    (folder / "soft").symlink_to(secret)
    os.link(secret, folder / "hard")
    (folder / "elsewhere").symlink_to(tmp_path)
    for name, reason in (("soft", "symbolic"), ("hard", "hard link"), ("elsewhere/secret", "symbolic")):
        with pytest.raises(UnsafeInputError, match=reason):
            inside(folder, name)


def test_accepts_plain_files_and_the_layout_of_the_hub_cache(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").write_text("x")
    assert inside(tmp_path, "sub/file") == tmp_path / "sub" / "file"
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "rev"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "abc").write_text("x")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    assert inside(snapshot, "config.json").read_text() == "x"
    (snapshot / "out.json").symlink_to("/etc/hostname")
    with pytest.raises(UnsafeInputError, match="symbolic"):
        inside(snapshot, "out.json")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("none", "sub"):
        with pytest.raises(InputError, match=r"file not found|file is a folder"):
            inside(tmp_path, name)
