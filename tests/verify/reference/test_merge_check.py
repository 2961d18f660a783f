"""A merged checkpoint is checked against base and adapter, value by value, apart from the code that merged it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.safetensors_file import read_header
from qalora_export.qalora.merge import merge
from qalora_export.verify.reference.merge_check import merge_check
from tests.qalora.adapters import QUERY, foreign_adapter, own_adapter


@pytest.fixture(scope="module")
def line(tiny_canonical: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("line")
    shutil.copytree(tiny_canonical, folder / "base.qalora")
    own_adapter(folder / "base.qalora", folder / "adapter")
    merge(folder / "base.qalora", folder / "adapter", folder / "merged", compare_logits=False)
    return folder


def check(folder: Path) -> dict[str, int]:
    return merge_check(CanonicalCheckpoint(folder / "merged")).wrong


def spoil(merged: Path, tensor: str, value: bytes) -> None:
    path = merged / "model.safetensors"
    entry = read_header(path)[tensor]
    with path.open("r+b") as file:
        file.seek(entry.begin)
        assert file.read(len(value)) != value
        file.seek(entry.begin)
        file.write(value)


def test_a_right_merge_has_no_findings(line: Path) -> None:
    found = merge_check(CanonicalCheckpoint(line / "merged"))
    assert (found.wrong, found.adapted, found.note) == ({}, 4, "")


@pytest.mark.parametrize(
    ("tensor", "value", "finding"),
    [
        (f"{QUERY}.offset", np.float16(0.5).tobytes(), f"{QUERY}.offset (not base + adapter)"),
        (f"{QUERY}.codes", b"\x00\x11", f"{QUERY}.codes (other than in the base)"),
        (
            "model.layers.0.self_attn.v_proj.offset",
            b"\x00\x00",
            "model.layers.0.self_attn.v_proj.offset (other than in the base)",
        ),
        ("model.norm.weight", b"\x00\x00", "model.norm.weight (other than in the base)"),
    ],
)
def test_a_changed_value_is_named(tensor: str, value: bytes, finding: str, line: Path, tmp_path: Path) -> None:
    shutil.copytree(line, tmp_path / "line")
    spoil(tmp_path / "line" / "merged", tensor, value)
    assert list(check(tmp_path / "line")) == [finding]


@pytest.fixture(scope="module")
def with_scales(tiny_canonical: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("with scales")
    shutil.copytree(tiny_canonical, folder / "base.qalora")
    own_adapter(folder / "base.qalora", folder / "adapter", scales=True)
    merge(folder / "base.qalora", folder / "adapter", folder / "merged", compare_logits=False)
    return folder


@pytest.mark.parametrize("part", ["scale", "offset"])
def test_trained_scales_are_recomputed_too(part: str, with_scales: Path, tmp_path: Path) -> None:
    assert check(with_scales) == {}
    shutil.copytree(with_scales, tmp_path / "line")
    merged = tmp_path / "line" / "merged"
    tensor = CanonicalCheckpoint(merged).tensor(f"{QUERY}.{part}")
    spoil(merged, f"{QUERY}.{part}", np.nextafter(tensor[0, 0], np.float16(9)).tobytes())
    found = check(tmp_path / "line")
    assert found[f"{QUERY}.{part} (not base + adapter)"] == 1
    # an offset belongs to its scale: whoever changes one step of a scale has an offset that no longer fits, too
    assert set(found) <= {f"{QUERY}.{name} (not base + adapter)" for name in (part, "offset")}
    spoil(merged, "model.layers.0.self_attn.v_proj.scale", b"\x00\x00")
    assert "model.layers.0.self_attn.v_proj.scale (other than in the base)" in check(tmp_path / "line")


def test_scales_moved_under_an_adapter_of_offsets_are_found(line: Path, with_scales: Path, tmp_path: Path) -> None:
    """Even where the manifest says that they were trained."""
    shutil.copytree(line, tmp_path / "line")
    merged = tmp_path / "line" / "merged"
    manifest = json.loads((merged / "manifest.json").read_text())
    manifest["settings"]["scales"] = True
    (merged / "manifest.json").write_text(json.dumps(manifest))
    spoil(merged, f"{QUERY}.scale", b"\x00\x00")
    assert list(check(tmp_path / "line")) == [f"{QUERY}.scale (other than in the base)"]


def test_without_the_adapter_trained_scales_are_said_to_be_unproven(
    line: Path, with_scales: Path, tmp_path: Path
) -> None:
    for source, what, wrong in ((line, "offsets not recomputed", 1), (with_scales, "offsets and scales not", 0)):
        folder = Path(shutil.copytree(source, tmp_path / source.name))
        shutil.rmtree(folder / "adapter")
        spoil(folder / "merged", f"{QUERY}.scale", b"\x00\x00")
        found = merge_check(CanonicalCheckpoint(folder / "merged"))
        assert what in found.note and "--adapter" in found.missing
        assert len(found.wrong) == wrong


def test_an_edited_adapter_is_a_broken_link_and_is_not_recomputed(line: Path, tmp_path: Path) -> None:
    shutil.copytree(line, tmp_path / "line")
    manifest = tmp_path / "line" / "adapter" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"edited": True}))
    found = merge_check(CanonicalCheckpoint(tmp_path / "line" / "merged"))
    assert "not recomputed" in found.note


@pytest.mark.parametrize("convention", ["sum", "mean", "peft"])
def test_an_imported_adapter_is_recomputed_in_its_convention(convention: str, line: Path, tmp_path: Path) -> None:
    shutil.copytree(line / "base.qalora", tmp_path / "base.qalora")
    foreign_adapter(
        tmp_path / "adapter", **({"use_qalora": True, "qalora_group_size": 32} if convention == "peft" else {})
    )
    merge(
        tmp_path / "base.qalora", tmp_path / "adapter", tmp_path / "merged", convention=convention, compare_logits=False
    )
    assert check(tmp_path) == {}


def test_a_base_is_no_merge(line: Path) -> None:
    assert merge_check(CanonicalCheckpoint(line / "base.qalora")).note == "not a merged checkpoint"
