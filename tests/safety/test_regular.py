"""What is no regular file is named as what it is, and nothing is opened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qalora_export.errors import InputError, printable
from qalora_export.safety import local_path, regular_file


def test_a_file_and_a_link_to_one_are_given_back(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    assert regular_file(tmp_path / "file") == tmp_path / "file"
    assert regular_file(tmp_path / "link") == tmp_path / "link"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none", "recipe not found"),
        ("folder", "recipe is a folder"),
        ("pipe", "recipe is a pipe"),
        ("device", "recipe is a device"),
        ("dangling", "recipe is a link that leads nowhere"),
        ("loop", "recipe cannot be read: Too many levels"),
        ("a\ud800", "recipe has a name that no file can have"),
        ("x" * 300, "recipe cannot be read: File name too long"),
        ("file/below", "recipe cannot be read: Not a directory"),
    ],
)
def test_everything_else_is_named(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for link, target in (("device", "/dev/zero"), ("dangling", "nowhere"), ("loop", "loop")):
        (tmp_path / link).symlink_to(target)
    with pytest.raises(InputError, match=said) as caught:
        regular_file(tmp_path / name, "recipe")
    assert caught.value.where == printable(tmp_path / name)


def test_a_link_to_itself_is_no_path(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="a link to itself"):
        local_path(tmp_path / "loop")
