"""Merging moves offsets and nothing else; what is written is what was trained."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.manifest import parent_of, read_manifest, verify_manifest
from qalora_export.errors import InputError, ParityError
from qalora_export.grid import GroupAffine, differing
from qalora_export.models.loading import load_model
from qalora_export.qalora import merge as merge_module
from qalora_export.qalora.adapter_files import ModuleAdapter, load_adapter
from qalora_export.qalora.attach import quantized_linears
from qalora_export.qalora.merge import merge, merged_offset
from tests.models import make_tiny_canonical, make_tiny_model
from tests.qalora.adapters import QUERY, foreign_adapter, own_adapter
from tests.qalora.layers import random_matrix

IDS = torch.from_numpy(np.random.default_rng(3).integers(0, 300, (2, 20)))


def test_only_offsets_of_adapted_modules_change(tiny_canonical: Path, tmp_path: Path) -> None:
    own_adapter(tiny_canonical, tmp_path / "adapter")
    report = merge(tiny_canonical, tmp_path / "adapter", tmp_path / "out")
    before, after = CanonicalCheckpoint(tiny_canonical), CanonicalCheckpoint(tmp_path / "out")
    moved = 0
    for name in before.modules:
        left, right = before.group_affine(name), after.group_affine(name)
        assert differing(left.codes, right.codes) == differing(left.scale, right.scale) == 0
        changed = differing(left.offset, right.offset)
        assert (changed > 0) == name.endswith(("q_proj", "down_proj"))
        moved += changed
    for name in before.plain_names():
        assert before.tensor(name).tobytes() == after.tensor(name).tobytes()
    assert (report.changed_codes, report.changed_scales, report.changed_other_tensors) == (0, 0, 0)
    assert report.changed_offsets == moved
    assert report.offsets == sum(before.group_affine(name).offset.size for name in before.modules)
    assert (report.modules, report.adapted, report.logits_differing) == (14, 4, 0)
    assert report.logits_compared == 4 * 32 * before.entry("lm_head.weight").shape[0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_model_is_the_trained_model_bit_for_bit(
    tiny_model: Path, tmp_path: Path, bits: int, dtype: torch.dtype
) -> None:
    base = make_tiny_canonical(tmp_path / "base", tiny_model, bits=bits, group=64)
    trained = own_adapter(base, tmp_path / "adapter", targets=("*",), pool=128)
    merge(base, tmp_path / "adapter", tmp_path / "out", compare_logits=False)
    merged = load_model(tmp_path / "out")
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), torch.no_grad():
        assert torch.equal(trained(IDS).logits, merged(IDS).logits)
        assert not torch.equal(load_model(base)(IDS).logits, merged(IDS).logits)
    if dtype == torch.bfloat16:
        narrow = load_model(base, dtype=dtype)
        load_adapter(narrow, tmp_path / "adapter")
        with torch.no_grad():
            assert torch.equal(narrow(IDS).logits, load_model(tmp_path / "out", dtype=dtype)(IDS).logits)


def test_written_offsets_equal_the_layers_own(tiny_canonical: Path, tmp_path: Path) -> None:
    trained = own_adapter(tiny_canonical, tmp_path / "adapter")
    merge(tiny_canonical, tmp_path / "adapter", tmp_path / "out", compare_logits=False)
    merged = CanonicalCheckpoint(tmp_path / "out")
    for name, layer in quantized_linears(trained).items():
        expected = layer.effective_offset().to(torch.float16).numpy()
        assert differing(merged.group_affine(name).offset, expected) == 0


def test_merged_offset_equals_a_slow_oracle() -> None:
    matrix = random_matrix(5, 192, group=32)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 2)).astype(np.float32), rng.normal(size=(5, 3)).astype(np.float32)
    found = merged_offset(matrix, ModuleAdapter(torch.from_numpy(a), torch.from_numpy(b), 0.75), where="m")
    for row in range(5):
        for group in range(6):
            delta = 0.75 * sum(float(b[row, k]) * float(a[k, group // 3]) for k in range(3))
            assert found[row, group] == np.float16(np.float32(float(matrix.offset[row, group]) + delta))


def test_manifest_names_both_parents(tiny_canonical: Path, tmp_path: Path) -> None:
    own_adapter(tiny_canonical, tmp_path / "adapter")
    merge(tiny_canonical, tmp_path / "adapter", tmp_path / "out", compare_logits=False)
    manifest = read_manifest(tmp_path / "out")
    assert manifest["kind"] == "merged"
    assert manifest["settings"] == {"convention": "sum"}
    assert [(p["role"], p["sha256"]) for p in manifest["parents"]] == [
        (role, parent_of(folder, role).sha256)
        for role, folder in (("base", tiny_canonical), ("adapter", tmp_path / "adapter"))
    ]
    assert verify_manifest(tmp_path / "out") == []


def test_equal_inputs_give_equal_bytes(tiny_canonical: Path, tmp_path: Path) -> None:
    own_adapter(tiny_canonical, tmp_path / "adapter")
    for place in ("one", "two"):
        merge(tiny_canonical, tmp_path / "adapter", tmp_path / place / "out", compare_logits=False)
    for path in (tmp_path / "one" / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / "out" / path.name).read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tied_models_with_biases_in_other_dtypes(tmp_path: Path, dtype: str) -> None:
    source = make_tiny_model(tmp_path / "m", dtype=dtype, tie_word_embeddings=True, attention_bias=True)
    base = make_tiny_canonical(tmp_path / "base", source)
    own_adapter(base, tmp_path / "adapter")
    assert merge(base, tmp_path / "adapter", tmp_path / "out").logits_differing == 0
    tensor = CanonicalCheckpoint(tmp_path / "out").tensor("model.embed_tokens.weight")
    assert tensor.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)


def test_offset_that_float16_cannot_hold_is_named(tiny_canonical: Path, tmp_path: Path) -> None:
    tensors = {
        f"{QUERY}.lora_A.weight": np.zeros((4, 4), np.float32),
        f"{QUERY}.lora_B.weight": np.zeros((128, 4), np.float32),
    }
    tensors[f"{QUERY}.lora_A.weight"][0, 2] = tensors[f"{QUERY}.lora_B.weight"][77, 0] = 300.0
    folder = foreign_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(InputError, match=r"does not fit in float16 \(1 of 512\).*q_proj\.offset: row 77, group 2"):
        merge(tiny_canonical, folder, tmp_path / "out", convention="sum")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


def test_existing_output_is_refused_and_force_replaces(tiny_canonical: Path, tmp_path: Path) -> None:
    own_adapter(tiny_canonical, tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists already"):
        merge(tiny_canonical, tmp_path / "adapter", tmp_path / "out")
    merge(tiny_canonical, tmp_path / "adapter", tmp_path / "out", force=True, compare_logits=False)
    assert not (tmp_path / "out" / "old").exists()


def test_a_damaged_base_is_refused(tiny_canonical: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_canonical, tmp_path / "base")
    own_adapter(tmp_path / "base", tmp_path / "adapter")
    path = tmp_path / "base" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"base differs from its manifest.*model\.safetensors"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def spoil_code(matrix: GroupAffine, offset: np.ndarray) -> GroupAffine:
    codes = matrix.codes.copy()
    codes[0, 0] ^= 1
    return GroupAffine(codes, matrix.scale, offset, matrix.bits)


def spoil_scale(matrix: GroupAffine, offset: np.ndarray) -> GroupAffine:
    return GroupAffine(matrix.codes, np.nextafter(matrix.scale, np.float16(9)), offset, matrix.bits)


@pytest.mark.parametrize(("spoil", "finding"), [(spoil_code, "changed codes = 4"), (spoil_scale, "changed scales = ")])
def test_a_merge_that_touches_codes_or_scales_keeps_nothing(
    tiny_canonical: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: object, finding: str
) -> None:
    own_adapter(tiny_canonical, tmp_path / "adapter")
    original = merge_module.merged_offset
    spoiled: list[GroupAffine] = []

    def capture(matrix: GroupAffine, adapter: ModuleAdapter, *, where: str) -> np.ndarray:
        spoiled.append(spoil(matrix, original(matrix, adapter, where=where)))
        return spoiled[-1].offset

    def build(codes: np.ndarray, scale: np.ndarray, offset: np.ndarray, bits: int) -> GroupAffine:
        return spoiled[-1]

    monkeypatch.setattr(merge_module, "merged_offset", capture)
    monkeypatch.setattr(merge_module, "GroupAffine", build)
    with pytest.raises(ParityError, match=finding):
        merge(tiny_canonical, tmp_path / "adapter", tmp_path / "out", compare_logits=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


def test_logits_that_differ_are_a_parity_failure(
    tiny_canonical: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One offset off by one float16 step: too little for any tolerance, enough for equal bits."""
    own_adapter(tiny_canonical, tmp_path / "adapter")
    original = merge_module.merged_offset

    def nudged(matrix: GroupAffine, adapter: ModuleAdapter, *, where: str) -> np.ndarray:
        offset = original(matrix, adapter, where=where)
        if where == QUERY:
            offset[0, 0] = np.nextafter(offset[0, 0], np.float16(9))
        return offset

    monkeypatch.setattr(merge_module, "merged_offset", nudged)
    with pytest.raises(ParityError, match="logits differing"):
        merge(tiny_canonical, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_report_is_plain_data(tiny_canonical: Path, tmp_path: Path) -> None:
    own_adapter(tiny_canonical, tmp_path / "adapter")
    report = merge(tiny_canonical, tmp_path / "adapter", tmp_path / "out", compare_logits=False)
    assert json.loads(json.dumps(asdict(report)))["logits_compared"] is None
