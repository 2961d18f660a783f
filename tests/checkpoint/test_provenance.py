"""The chain of hashes: what is here and right, what is not here, what is here and wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.canonical_writer import CanonicalWriter
from qalora_export.checkpoint.manifest import Parent, parent_of, write_manifest
from qalora_export.checkpoint.provenance import artifact_links, checkpoint_links, kind_of, parent_folder
from qalora_export.errors import UnsafeInputError
from tests.verify.exports import Exported, copy_of


@pytest.fixture
def family(tiny_canonical: Path, tmp_path: Path) -> Path:
    """base.qalora, adapter and merged.qalora beside each other; merged holds the numbers of the base."""
    base = tmp_path / "base.qalora"
    shutil.copytree(tiny_canonical, base)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "weights").write_bytes(b"adapter")
    write_manifest(adapter, "adapter", tensors={}, parents=[parent_of(base, "base")], settings={})
    merge_of(base, tmp_path, [parent_of(base, "base"), parent_of(adapter, "adapter")])
    return tmp_path


def merge_of(base: Path, folder: Path, parents: list[Parent]) -> Path:
    source = CanonicalCheckpoint(base)
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    with CanonicalWriter(
        folder / "merged.qalora", config, source.companions(), kind="merged", parents=parents, force=True
    ) as out:
        for name in source.plain_names():
            out.add(name, source.tensor(name))
        for module in source.modules:
            out.add_quantized(module, source.group_affine(module))
    return folder / "merged.qalora"


def states(folder: Path) -> dict[tuple[str, str], str]:
    return {(link.child, link.role): link.state for link in checkpoint_links(folder / "merged.qalora")}


def test_the_whole_chain_is_walked(family: Path) -> None:
    assert states(family) == {
        ("merged.qalora", "base"): "verified",
        ("merged.qalora", "adapter"): "verified",
        ("base.qalora", "source"): "not found",
        ("adapter", "base"): "verified",
    }
    assert parent_folder(family / "merged.qalora", "base") == (family / "base.qalora").resolve()
    assert kind_of(family / "merged.qalora") == "merged"


def test_an_absent_base_is_not_found_and_breaks_nothing(family: Path) -> None:
    shutil.rmtree(family / "base.qalora")
    assert states(family)[("merged.qalora", "base")] == "not found"
    assert parent_folder(family / "merged.qalora", "base") is None


def test_another_base_under_the_same_name_is_broken(family: Path) -> None:
    manifest = family / "base.qalora" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"settings": {}', '"settings": {"bits": 3}'))
    assert states(family)[("merged.qalora", "base")] == "broken"
    assert parent_folder(family / "merged.qalora", "base") is None


def test_an_adapter_trained_on_another_base_is_broken(family: Path) -> None:
    base, adapter = family / "base.qalora", family / "adapter"
    content = json.loads((adapter / "manifest.json").read_text())
    content["parents"][0]["sha256"] = "1" * 64
    (adapter / "manifest.json").write_text(json.dumps(content))
    merge_of(base, family, [parent_of(base, "base"), parent_of(adapter, "adapter")])
    broken = [link for link in checkpoint_links(family / "merged.qalora") if link.state == "broken"]
    assert any("another base" in link.note for link in broken)


def test_a_file_changed_since_its_manifest_is_broken(family: Path) -> None:
    (family / "merged.qalora" / "chat_template.jinja").write_text("{{ messages }}")
    assert states(family)[("merged.qalora", "file")] == "broken"


def test_a_parent_name_cannot_leave_the_folder(family: Path, tmp_path: Path) -> None:
    base = family / "base.qalora"
    evil = Parent("base", "../" + base.name, parent_of(base, "base").sha256)
    merged = merge_of(base, family, [evil])
    assert [link.state for link in checkpoint_links(merged)] == ["not found"]


def test_artifact_files_and_checkpoint_are_verified(exported: Exported, tmp_path: Path) -> None:
    copy = copy_of(exported, tmp_path)
    for artifact in (copy.gguf, copy.onnx):
        links = artifact_links(artifact, exported.checkpoint)
        assert {link.state for link in links} == {"verified"}
        assert {link.role for link in links} == {"file", "checkpoint"}
    with copy.gguf.open("ab") as file:
        file.write(b"\0")
    assert [link.state for link in artifact_links(copy.gguf, exported.checkpoint) if link.role == "file"] == ["broken"]
    copy.gguf.with_name("model.gguf.manifest.json").unlink()
    assert [link.state for link in artifact_links(copy.gguf, exported.checkpoint)] == ["not found"]


def test_a_manifest_that_names_a_file_elsewhere_is_refused(exported: Exported, tmp_path: Path) -> None:
    copy = copy_of(exported, tmp_path)
    manifest = copy.onnx / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"onnx/model.onnx"', '"../model.gguf"', 1))
    with pytest.raises(UnsafeInputError):
        artifact_links(copy.onnx, exported.checkpoint)
