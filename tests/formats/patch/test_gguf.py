"""Which bytes of a block are offsets, for each type that has them: K-quants pack their levels with those of scales;
and the adapter of layout split."""

from __future__ import annotations

import shutil
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qalora_runtimes.patches import decompress, with_differences

from qalora_export.errors import InputError
from qalora_export.formats.gguf.export import export_gguf
from qalora_export.formats.gguf.types import BLOCK_TYPES
from qalora_export.formats.patch.apply import apply
from qalora_export.formats.patch.export import export_patch
from qalora_export.formats.patch.gguf import gguf_tensor
from qalora_export.formats.patch.writer import PatchWriter
from qalora_export.grid import GroupAffine, Levels, PackedAffine
from qalora_export.recipe import GgufSettings
from tests.formats.gguf.test_super_blocks import TYPES, random_matrix
from tests.formats.patch.artifacts import content, moved


def other_offsets(matrix: GroupAffine, grid: Any, **parts: Any) -> GroupAffine:
    """The same codes and scales with other offset levels and steps. parts: what else is another."""
    levels, random = matrix.levels, np.random.default_rng(1)
    given = {
        "scale": levels.scale,
        "offset": random.integers(0, grid.top + 1, levels.offset.shape, np.uint8),
        "scale_step": levels.scale_step,
        "offset_step": (levels.offset_step.astype(np.float32) * 1.25).astype(np.float16),
    }
    return GroupAffine.on_levels(matrix.codes, Levels(grid, *(given | parts).values()))


def patched(kind: Any, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """What a patch makes of `old`."""
    content = BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        (segment,) = gguf_tensor("a tensor", kind.name, old.reshape(-1), new.reshape(-1), PatchWriter(archive))
    with zipfile.ZipFile(content) as archive:
        raw = decompress(archive.read("0.xz"), segment.raw)
    blocks = old.reshape(-1, segment.block)
    return with_differences(blocks, raw, list(segment.fields), reverse=False).reshape(old.shape)


@pytest.mark.parametrize("kind", list(TYPES.values()), ids=list(TYPES))
def test_levels_and_steps_of_offsets_go_through_a_patch(kind: Any) -> None:
    matrix = random_matrix(kind, 3, 2, 0)
    old, new = (kind.pack(PackedAffine.pack(m)) for m in (matrix, other_offsets(matrix, kind.grid)))
    assert not np.array_equal(old, new)
    assert np.array_equal(patched(kind, old, new), new)


@pytest.mark.parametrize("kind", list(TYPES.values()), ids=list(TYPES))
def test_levels_and_steps_of_trained_scales_do_too(kind: Any) -> None:
    matrix = random_matrix(kind, 3, 2, 0)
    scale, step = matrix.levels.scale.copy(), matrix.levels.scale_step.copy()
    scale[1, 3] ^= 1
    step[2, 0] *= np.float16(1.25)
    new = other_offsets(matrix, kind.grid, scale=scale, scale_step=step)
    old, new = (kind.pack(PackedAffine.pack(m)) for m in (matrix, new))
    assert np.array_equal(patched(kind, old, new), new)


@pytest.mark.parametrize("kind", list(TYPES.values()), ids=list(TYPES))
def test_other_codes_in_super_blocks_are_no_fine_tune(kind: Any) -> None:
    matrix = random_matrix(kind, 3, 2, 0)
    codes = matrix.codes.copy()
    codes[1, 300] ^= 1
    old, new = (kind.pack(PackedAffine.pack(GroupAffine.on_levels(c, matrix.levels))) for c in (matrix.codes, codes))
    with pytest.raises(InputError, match="codes differ"):
        patched(kind, old, new)


def test_a_symmetric_grid_has_nothing_that_training_moves() -> None:
    kind = BLOCK_TYPES["Q6_K"]
    old = np.zeros((2, kind.block_bytes), np.uint8)
    new = old.copy()
    new[1, -1] = 1
    with pytest.raises(InputError, match="grid is symmetric"):
        patched(kind, old, new)


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0"])
def test_a_type_without_offsets_may_not_differ(name: str) -> None:
    kind = BLOCK_TYPES[name]
    old = np.zeros((2, kind.block_bytes), np.uint8)
    new = old.copy()
    new[1, -1] = 1
    with pytest.raises(InputError, match="codes differ"):
        patched(kind, old, new)


def test_of_layout_split_the_adapter_is_patched_too(tiny_canonical: Path, tmp_path: Path) -> None:
    """One base, adapters that differ: there and back, beside it, and never over an adapter that lies there."""
    for seed, name in enumerate(("one", "two")):
        checkpoint = moved(tiny_canonical, tmp_path / f"{name}.qalora", seed)
        (tmp_path / name).mkdir()
        export_gguf(checkpoint, tmp_path / name / "model.gguf", GgufSettings(layout="split"))
    report = export_patch(tmp_path / "one" / "model.gguf", tmp_path / "two" / "model.gguf", tmp_path / "patch")
    before, after = content(tmp_path / "one" / "model.gguf"), content(tmp_path / "two" / "model.gguf")
    assert set(before) == {"model.gguf", "model.lora.gguf", "model.gguf.manifest.json"}
    assert report.of == sum(len(after[name]) for name in ("model.gguf", "model.lora.gguf"))
    assert 0 < report.moved <= report.offsets
    target = Path(shutil.copytree(tmp_path / "one", tmp_path / "here")) / "model.gguf"
    apply(tmp_path / "patch", target)
    assert content(target) == after
    apply(tmp_path / "patch", target, reverse=True)
    assert content(target) == before
    elsewhere = tmp_path / "elsewhere" / "model.gguf"
    apply(tmp_path / "patch", target, elsewhere)
    assert content(elsewhere) == after
    for name in ("model.gguf", "model.gguf.manifest.json"):
        (elsewhere.parent / name).unlink()
    (elsewhere.parent / "model.lora.gguf").write_bytes(b"mine")
    for force in (False, True):
        with pytest.raises(InputError, match="only what this program made" if force else "exists already"):
            apply(tmp_path / "patch", target, elsewhere, force=force)
    assert content(elsewhere) == {"model.lora.gguf": b"mine"}
    assert content(target) == before
