"""The F32 twin is the artifact's own numbers and metadata, also when the artifact is damaged."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.errors import ParityError
from qalora_export.formats.gguf.read import read_back
from qalora_export.verify.runtimes import twin
from tests.verify.exports import Exported, copy_of, gguf_block, patch, read_at


def fields(path: Path) -> dict[str, object]:
    return {f.name: f.contents() for f in GGUFReader(path).fields.values() if not f.name.startswith("GGUF.")}


def test_every_tensor_is_f32_and_the_checkpoints_number(exported: Exported, tmp_path: Path) -> None:
    count = twin.write_twin(exported.gguf, tmp_path / "twin.gguf")
    assert count == len(GGUFReader(exported.gguf).tensors)
    assert {t.tensor_type.name for t in GGUFReader(tmp_path / "twin.gguf").tensors} == {"F32"}
    contents, checkpoint = read_back(tmp_path / "twin.gguf"), CanonicalCheckpoint(exported.checkpoint)
    for module in checkpoint.modules:
        np.testing.assert_array_equal(contents.tensor(f"{module}.weight"), checkpoint.group_affine(module).dequantize())
    for name in checkpoint.plain_names():
        np.testing.assert_array_equal(contents.tensor(name), checkpoint.tensor(name).astype(np.float32))
    before, after = fields(exported.gguf), fields(tmp_path / "twin.gguf")
    assert after.pop("general.file_type") == 0
    before.pop("general.file_type")
    assert before == after


def test_damage_goes_along(exported: Exported, tmp_path: Path) -> None:
    copy = copy_of(exported, tmp_path)
    at = gguf_block(copy.gguf, "blk.0.attn_k.weight") + 4
    patch(copy.gguf, at, bytes([read_at(copy.gguf, at, 1)[0] ^ 1]))
    twin.write_twin(exported.gguf, tmp_path / "right.gguf")
    twin.write_twin(copy.gguf, tmp_path / "wrong.gguf")
    right, wrong = (
        {t.name: np.array(t.data) for t in GGUFReader(tmp_path / f"{n}.gguf").tensors} for n in ("right", "wrong")
    )
    assert [name for name in right if not np.array_equal(right[name], wrong[name])] == ["blk.0.attn_k.weight"]


def test_a_twin_that_does_not_hold_the_artifact_is_refused(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = twin._dequantized
    calls = []

    def wrong_at_first(reader):
        calls.append(reader)
        return ((name, values + 1 if len(calls) == 1 else values) for name, values in right(reader))

    monkeypatch.setattr(twin, "_dequantized", wrong_at_first)
    with pytest.raises(ParityError, match="twin"):
        twin.write_twin(exported.gguf, tmp_path / "twin.gguf")
