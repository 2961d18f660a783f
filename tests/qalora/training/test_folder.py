"""When a training folder is continued, refused or emptied."""

from pathlib import Path

import pytest

from qalora_export.errors import InputError
from qalora_export.qalora.training import folder as tf

RUN = {"settings": {"rank": 16, "learning_rate": 1e-3}, "base": "abc", "processes": 1}


def add_checkpoint(folder: Path, step: int, *, complete: bool = True) -> Path:
    path = tf.checkpoint(folder, step)
    path.mkdir()
    (path / tf.ADAPTER).write_bytes(b"x" * step)
    if complete:
        tf.mark_complete(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tf.folder_for(tmp_path / "adapter")
    assert folder == tmp_path / "adapter.training"
    tf.prepare(folder, RUN, resume=True, force=False)
    return folder


def test_the_newest_complete_checkpoint_counts(folder: Path) -> None:
    assert tf.last_checkpoint(folder) is None
    for step in (9, 10):
        add_checkpoint(folder, step)
    add_checkpoint(folder, 11, complete=False)  # killed before the commit mark
    damaged = add_checkpoint(folder, 12)
    (damaged / tf.ADAPTER).write_bytes(b"x" * 11)
    half_deleted = add_checkpoint(folder, 13)
    (half_deleted / tf.ADAPTER).unlink()
    assert tf.last_checkpoint(folder) == tf.checkpoint(folder, 10)
    tf.keep_only(folder, {9, 10})
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-9"]


def test_the_same_run_goes_on(folder: Path) -> None:
    kept = add_checkpoint(folder, 5)
    tf.prepare(folder, RUN, resume=True, force=False)
    assert tf.last_checkpoint(folder) == kept


def test_a_changed_run_is_refused_by_name(folder: Path) -> None:
    add_checkpoint(folder, 5)
    changed = RUN | {"settings": {"rank": 8, "learning_rate": 1e-3}, "base": "def"}
    with pytest.raises(InputError, match="cannot resume") as error:
        tf.prepare(folder, changed, resume=True, force=False)
    assert error.value.why == "changed since then: base, settings.rank"
    assert "--no-resume" in error.value.fix
    tf.prepare(folder, changed, resume=True, force=True)
    assert tf.last_checkpoint(folder) is None


def test_no_resume_and_a_run_without_checkpoints_start_fresh(folder: Path) -> None:
    tf.prepare(folder, RUN | {"base": "def"}, resume=True, force=False)
    add_checkpoint(folder, 5)
    tf.prepare(folder, RUN, resume=False, force=False)
    assert tf.last_checkpoint(folder) is None


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="in the way"):
        tf.prepare(tmp_path, RUN, resume=True, force=True)
    assert (tmp_path / "thesis.txt").exists()
