"""Kept answers: the same to the bit, for the same question alone, and never a damaged one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qalora_export.recipe import VerifySettings
from qalora_export.safety import HashedOnce
from qalora_export.verify import store as module
from qalora_export.verify.reference import logits
from qalora_export.verify.stage import verify_parity
from qalora_export.verify.store import Arrays, Store, kept_in, opened, remembered
from tests.verify.exports import Exported
from tests.verify.fakes import FakeRuntimes

PACKAGES = ("numpy",)


class Asked:
    """Computes, and counts how often."""

    def __init__(self, rows: int = 3) -> None:
        self.times, self.rows = 0, rows

    def __call__(self) -> Arrays:
        self.times += 1
        return {"logprobs": np.arange(4 * self.rows, dtype=np.float32).reshape(self.rows, 4) / 3}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    return tmp_path / "model"


def ask(folder: Path, model: Path, compute: Asked, what: str = "reference", **asked: Any) -> np.ndarray:
    """As a run of its own does."""
    return Store(folder).arrays(what, compute, of=model, packages=PACKAGES, **{"threads": 1} | asked)["logprobs"]


def test_the_second_run_gets_the_same_bits_without_computing(model: Path, tmp_path: Path) -> None:
    compute = Asked()
    first, second = (ask(tmp_path / "kept", model, compute) for _ in range(2))
    assert compute.times == 1
    assert first.dtype == second.dtype and first.tobytes() == second.tobytes()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m, _: (m / "model.safetensors").write_bytes(b"Weights"), id="weights"),
        pytest.param(lambda m, _: (m / "config.json").write_text('{"rms_norm_eps": 1}'), id="config"),
        pytest.param(lambda m, _: (m / "added.json").write_text("{}"), id="another file"),
        pytest.param(lambda m, _: (m / "weights.of-a-new-kind").write_bytes(b"x"), id="a file of any name"),
        pytest.param(lambda m, _: (m / "config.json").rename(m / "other.json"), id="another name"),
        pytest.param(lambda _, p: p.setattr(module, "code_version", lambda: "other"), id="code"),
        pytest.param(lambda _, p: p.setattr(module, "package_version", lambda _: "other"), id="packages"),
        pytest.param(lambda _, p: p.setattr(module, "kernels", lambda: {"flags": []}), id="CPU"),
        pytest.param(lambda _, p: p.setenv("ATEN_CPU_CAPABILITY", "default"), id="kernels of torch"),
    ],
)
def test_another_question_is_computed(
    change: Callable[[Path, pytest.MonkeyPatch], object],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compute = Asked()
    ask(tmp_path / "kept", model, compute)
    change(model, monkeypatch)
    ask(tmp_path / "kept", model, compute)
    assert compute.times == 2


def test_what_is_asked_is_part_of_the_question(model: Path, tmp_path: Path) -> None:
    compute = Asked()
    for asked in ({}, {"threads": 2}, {"block": None}, {"block": 32}, {"what": "int8 simulation"}):
        ask(tmp_path / "kept", model, compute, **asked)
    assert compute.times == 5


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(flip, id="one bit"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-9]), id="cut short"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_bytes(b"PK\x03\x04 no archive"), id="no npz"),
    ],
)
def test_a_damaged_entry_is_computed_anew_and_replaced(
    damage: Callable[[Path], object], model: Path, tmp_path: Path
) -> None:
    compute, kept = Asked(), tmp_path / "kept"
    right = ask(kept, model, compute)
    damage(next(kept.iterdir()))
    assert np.array_equal(ask(kept, model, compute), right)
    assert np.array_equal(ask(kept, model, compute), right)
    assert compute.times == 2


def test_an_entry_under_another_name_is_not_an_answer(model: Path, tmp_path: Path) -> None:
    """Right bytes, right digest, another question."""
    compute, kept = Asked(), tmp_path / "kept"
    ask(kept, model, compute)
    path = next(kept.iterdir())
    ask(kept, model, Asked(rows=5), threads=7)
    other = next(p for p in kept.iterdir() if p != path)
    digest = path.name.split(".")[1]
    path.rename(other.with_name(f"{other.name.split('.')[0]}.{digest}.npz"))
    other.unlink()
    assert ask(kept, model, Asked(rows=5), threads=7).shape == (5, 4)


def test_nothing_is_kept_of_a_model_that_changed_meanwhile(model: Path, tmp_path: Path) -> None:
    def changes() -> Arrays:
        (model / "model.safetensors").write_bytes(b"swapped")
        return {"logprobs": np.zeros((1, 1), np.float32)}

    Store(tmp_path / "kept").arrays("reference", changes, of=model, packages=PACKAGES)
    assert not (tmp_path / "kept").exists()


def test_the_longest_unused_go_when_the_folder_is_full(model: Path, tmp_path: Path) -> None:
    kept, compute = tmp_path / "kept", Asked(rows=1000)  # 16 kB each
    store = Store(kept, limit=70_000)
    for threads in (1, 2):
        store.arrays("reference", compute, of=model, packages=PACKAGES, threads=threads)
    old = {path.name for path in kept.iterdir()}
    for path in kept.iterdir():
        os.utime(path, (0, 0))
    store.arrays("reference", compute, of=model, packages=PACKAGES, threads=2)  # used again
    for threads in (3, 4):
        store.arrays("reference", compute, of=model, packages=PACKAGES, threads=threads)
    assert sum(path.stat().st_size for path in kept.iterdir()) <= 70_000
    assert compute.times == 4
    store.arrays("reference", compute, of=model, packages=PACKAGES, threads=2)
    assert compute.times == 4
    assert len(old & {path.name for path in kept.iterdir()}) == 1


def test_what_is_larger_than_the_folder_may_be_is_not_kept(model: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "kept", limit=1000)
    store.arrays("reference", Asked(rows=1000), of=model, packages=PACKAGES)
    assert not (tmp_path / "kept").exists()


def test_what_a_killed_process_left_is_removed(model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir(mode=0o700)
    (kept / ".0123.npz.partial").write_bytes(b"half")
    os.utime(kept / ".0123.npz.partial", (0, 0))
    ask(kept, model, Asked())
    assert [path.suffix for path in kept.iterdir()] == [".npz"]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners here")
def test_a_folder_that_others_can_write_is_neither_believed_nor_filled(model: Path, tmp_path: Path) -> None:
    kept, compute = tmp_path / "kept", Asked()
    ask(kept, model, compute)
    kept.chmod(0o777)
    ask(kept, model, compute)
    assert compute.times == 2
    kept.chmod(0o700)


def test_a_folder_that_cannot_be_made_costs_nothing_but_time(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    compute = Asked()
    for _ in range(2):
        ask(tmp_path / "file" / "kept", model, compute)
    assert compute.times == 2


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def folder() -> Path | None:
        store = opened(HashedOnce())
        return store and store.folder

    monkeypatch.setenv("QALORA_CACHE", str(tmp_path))
    assert folder() == tmp_path / "verify"
    monkeypatch.setenv("QALORA_CACHE", "")
    assert folder() is None
    monkeypatch.delenv("QALORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder() == tmp_path / "xdg" / "qalora-export" / "verify"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder() == tmp_path / ".cache" / "qalora-export" / "verify"


def test_outside_a_run_everything_is_computed(model: Path, tmp_path: Path) -> None:
    compute = Asked()
    with kept_in(None):
        for _ in range(2):
            remembered("reference", compute, of=model, packages=PACKAGES)
    assert compute.times == 2


def test_a_second_run_says_the_same_and_computes_no_reference(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QALORA_CACHE", str(tmp_path / "kept"))
    checkpoint = shutil.copytree(exported.checkpoint, tmp_path / "base.qalora")

    def verify(name: str, **options: Any) -> dict[str, Any]:
        settings = VerifySettings(runtimes=("llama.cpp",), threads=1)
        fake = FakeRuntimes(exported.checkpoint)
        verify_parity(checkpoint, tmp_path / name, settings, gguf=exported.gguf, launch=fake, **options)
        return json.loads((tmp_path / name / "report.json").read_text())

    models: list[Path] = []
    right = logits.LayerwiseModel
    monkeypatch.setattr(logits, "LayerwiseModel", lambda path, **o: models.append(path) or right(path, **o))
    first, made = verify("first"), models.count(checkpoint)
    second = verify("second")
    assert made == 3  # the reference, the simulation, and the long sequence of G6
    assert models.count(checkpoint) == made
    verify("third", cache=False)
    assert models.count(checkpoint) == 2 * made
    unmeasured = [[{**gate, "seconds": None} for gate in report["gates"]] for report in (first, second)]
    assert unmeasured[0] == unmeasured[1]
    assert "int8 simulation" not in first["reference"]["from_earlier_runs"]
    every = {"reference", "int8 simulation", "long sequence", "greedy answers"}
    assert set(second["reference"]["from_earlier_runs"]) == every
