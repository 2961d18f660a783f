"""An embedding on Q8_0 blocks comes back as the very blocks it came from; any other is left alone."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file, save_file

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.formats.contents import EMBEDDING
from qalora_export.formats.gguf.export import export_gguf
from qalora_export.formats.gguf.file import GgufFile
from qalora_export.formats.gguf.plain_blocks import blocks_of, lies_on_blocks
from qalora_export.formats.gguf.read import read_back
from qalora_export.quantization.stage import quantize as quantize_stage
from qalora_export.recipe import QuantizeSettings
from tests.models import make_tiny_model

Q8_0 = gguf.GGMLQuantizationType.Q8_0


def random_values(rows: int = 48, width: int = 128) -> np.ndarray:
    values = np.random.default_rng(0).normal(0, 0.05, (rows, width)).astype(np.float32)
    values[3] = 0
    values[4, 32:64] *= 1000
    values[5, :32] *= 1e-9  # d underflows to 0 and leaves zeros of both signs
    values[6, :32] *= 1e-4  # d is a subnormal float16
    return values


def folder_with(path: Path, values: np.ndarray) -> ModelFolder:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    save_file({EMBEDDING: values, "lm_head.weight": values}, path / "model.safetensors")
    return ModelFolder(path)


def on_blocks(values: np.ndarray) -> np.ndarray:
    return dequantize(quantize(values, Q8_0), Q8_0)


def test_llama_cpps_own_blocks_come_back_byte_for_byte(tmp_path: Path) -> None:
    values = on_blocks(random_values())
    assert lies_on_blocks(folder_with(tmp_path, values), EMBEDDING)
    blocks = blocks_of(values)
    assert np.array_equal(dequantize(blocks, Q8_0).view(np.uint32), values.view(np.uint32))
    usual = [row for row in range(len(values)) if row not in (5, 6)]
    assert np.array_equal(blocks[usual], quantize(random_values(), Q8_0)[usual])


def test_only_embeddings_are_looked_at(tmp_path: Path) -> None:
    assert not lies_on_blocks(folder_with(tmp_path, on_blocks(random_values())), "lm_head.weight")


CHANGES = {
    "as it was trained": lambda v: random_values(),
    "one value an ulp off": lambda v: np.where(np.arange(v.size).reshape(v.shape) == 777, np.nextafter(v, 1), v),
    "a negative zero": lambda v: np.where(v == 0, np.float32(-0.0), v),
    "NaN": lambda v: np.where(np.arange(v.size).reshape(v.shape) == 9, np.float32("nan"), v),
    "infinite": lambda v: np.where(np.arange(v.size).reshape(v.shape) == 9, np.float32("inf"), v),
    "d beyond float16": lambda v: v * np.float32(2.0**24),
    "a width that is no multiple of 32": lambda v: v[:, :48],
    "float16": lambda v: v.astype(np.float16),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_other_embedding_is_left_alone(tmp_path: Path, change: str) -> None:
    values = np.ascontiguousarray(CHANGES[change](on_blocks(random_values())))
    assert not lies_on_blocks(folder_with(tmp_path, values), EMBEDDING)


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_with_such_an_embedding_is_exported_in_blocks(tmp_path: Path, tied: bool) -> None:
    source = make_tiny_model(tmp_path / "model", num_hidden_layers=1, tie_word_embeddings=tied)
    tensors = load_file(source / "model.safetensors")
    tensors[EMBEDDING] = on_blocks(tensors[EMBEDDING].astype(np.float32))
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    quantize_stage(source, tmp_path / "base", QuantizeSettings(method="rtn"))
    report = export_gguf(tmp_path / "base", tmp_path / "model.gguf")
    assert report.differing == 0
    stored = GgufFile(tmp_path / "model.gguf").tensors["token_embd.weight"]
    assert stored.kind == "Q8_0"
    contents = read_back(tmp_path / "model.gguf")
    assert EMBEDDING in contents.others
    assert set(contents.modules) == set(CanonicalCheckpoint(tmp_path / "base").modules)
    assert contents.stored(EMBEDDING) == ("Q8_0", tensors[EMBEDDING].size // 32 * 34)
    assert np.array_equal(contents.tensor(EMBEDDING, slice(3, 9)), tensors[EMBEDDING][3:9])
    again = tmp_path / "again"
    quantize_stage(tmp_path / "model.gguf", again, QuantizeSettings(method="rtn"))
    assert np.array_equal(np.asarray(CanonicalCheckpoint(again).tensor(EMBEDDING)), tensors[EMBEDDING])
    export_gguf(again, tmp_path / "again.gguf")
    rows = GgufFile(tmp_path / "again.gguf").tensors["token_embd.weight"].rows
    assert np.array_equal(rows, stored.rows)
