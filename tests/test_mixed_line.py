"""A model in a mix of grids goes the whole line: the preset, symmetric modules beside it, the embedding in blocks."""

import json
from pathlib import Path

import numpy as np
import pytest

import qalora_export as q
from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.checkpoint.safetensors_file import read_header
from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.formats.contents import FolderContents, compare
from qalora_export.formats.gguf.file import GgufFile
from qalora_export.formats.gguf.read import read_back
from qalora_export.formats.gguf.types import BLOCK_TYPES
from qalora_export.formats.onnx.read import read_back as read_onnx
from qalora_export.grid import differing
from qalora_export.inspection.view import byte_table, open_view
from qalora_export.models.loading import load_model
from qalora_export.recipe import QuantizeRule
from qalora_export.verify.reference.merge_check import merge_check
from qalora_export.verify.reference.source_weights import changed_weights
from tests.conftest import MadeOnce
from tests.models import make_tiny_model
from tests.verify.exports import verified

pytestmark = pytest.mark.usefixtures("warm_runners")
SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_attention_heads": 4}
EMBEDDING = "model.embed_tokens"
SIX_BITS, EIGHT_BITS = "model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def line(made_once: MadeOnce) -> Path:
    """model, base, adapter of two steps, merged, model.gguf and onnx; lm_head is the embedding."""
    return made_once("mixed-grids", lambda folder: make_line(folder, tied=True))


def make_line(folder: Path, *, tied: bool) -> None:
    make_tiny_model(folder / "model", **SIZES, tie_word_embeddings=tied)
    rows = [{"prompt": f"turn on {n}", "completion": f"on {n}"} for n in range(8)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = q.QuantizeSettings(
        preset="q4_k_m",
        rules=(QuantizeRule(match=SIX_BITS, grid="q6_k"), QuantizeRule(match=EIGHT_BITS, grid="q8_0")),
        calibration=str(folder / "data.jsonl"),
        calibration_samples=4,
        sequence_length=64,
        sweeps=1,
    )
    report = q.quantize(folder / "model", folder / "base", settings)
    assert report.modules[0].name == EMBEDDING
    training = q.TrainSettings(data=str(folder / "data.jsonl"), rank=2, max_steps=2, batch_size=4, learning_rate=1e-2)
    trained = q.train(folder / "base", folder / "adapter", training)
    assert set(trained.untrained) - {"lm_head"} == {SIX_BITS, EIGHT_BITS}
    merged = q.merge(folder / "base", folder / "adapter", folder / "merged")
    assert (merged.changed_codes, merged.changed_scales, merged.logits_differing) == (0, 0, 0)
    assert 0 < merged.changed_offsets < merged.offsets
    q.export_gguf(folder / "merged", folder / "model.gguf")
    q.export_onnx(folder / "merged", folder / "onnx")


def test_what_the_checkpoint_says(line: Path) -> None:
    merged = CanonicalCheckpoint(line / "merged")
    assert merged.config["quantization_config"]["embeddings"] == {
        EMBEDDING: {"bits": 6, "group_size": 16, "grid": "q6_k"}
    }
    assert EMBEDDING not in merged.modules
    assert f"{EMBEDDING}.weight" in merged.plain_names()
    assert not any(name.startswith(f"{EMBEDDING}.") and name[-6:] != "weight" for name in merged.plain_names())
    assert (merged.modules[SIX_BITS], merged.grids[SIX_BITS].name) == ((6, 16), "q6_k")
    assert (merged.modules[EIGHT_BITS], merged.grids[EIGHT_BITS].name) == ((8, 32), "affine16")
    assert f"{SIX_BITS}.offset" not in merged.names()


def test_the_embedding_is_a_plain_tensor_to_readers_rows_and_all(line: Path) -> None:
    merged, name = CanonicalCheckpoint(line / "merged"), f"{EMBEDDING}.weight"
    whole = merged.tensor(name)
    assert (whole.dtype, whole.shape) == (merged.entry(name).dtype, merged.entry(name).shape)
    np.testing.assert_array_equal(whole, merged.group_affine(EMBEDDING).dequantize())
    assert differing(merged.rows(name, slice(3, 9)), whole[3:9]) == 0
    assert name in merged
    assert "model.nothing.weight" not in merged
    model = load_model(line / "merged")
    assert differing(model.get_input_embeddings().weight.detach().numpy(), whole) == 0
    assert model.lm_head.weight is model.get_input_embeddings().weight
    source = np.asarray(CanonicalCheckpoint(line / "base").tensor(name))
    assert differing(source, whole) == 0  # training does not move it


def test_save_pretrained_writes_a_plain_embedding(line: Path, tmp_path: Path) -> None:
    model = load_model(line / "merged")
    model.save_pretrained(tmp_path)
    saved = CanonicalCheckpoint(tmp_path)
    assert saved.embeddings == {}
    assert differing(saved.tensor(f"{EMBEDDING}.weight"), model.get_input_embeddings().weight.detach().numpy()) == 0
    assert saved.modules == CanonicalCheckpoint(line / "merged").modules


def test_the_merge_is_recomputed_apart(line: Path) -> None:
    found = merge_check(CanonicalCheckpoint(line / "merged"), base=line / "base")
    assert (found.wrong, found.adapted) == ({}, 12)


def test_gguf_holds_every_grid_byte_for_byte(line: Path) -> None:
    merged, file = CanonicalCheckpoint(line / "merged"), GgufFile(line / "model.gguf")
    kinds = {
        "token_embd": (EMBEDDING, "Q6_K"),
        "blk.0.attn_v": (SIX_BITS, "Q6_K"),
        "blk.0.ffn_down": (EIGHT_BITS, "Q8_0"),
        "blk.0.ffn_up": ("model.layers.0.mlp.up_proj", "Q4_K"),
        "blk.1.attn_v": ("model.layers.1.self_attn.v_proj", "Q5_K"),
        "blk.1.ffn_down": ("model.layers.1.mlp.down_proj", "Q5_K"),
    }
    for name, (module, kind) in kinds.items():
        tensor = file.tensors[f"{name}.weight"]
        assert tensor.kind == kind
        assert np.array_equal(tensor.rows, BLOCK_TYPES[kind].pack(merged.packed(module)))
    assert compare(FolderContents(merged), read_back(line / "model.gguf")).total == 0
    sizes = byte_table(open_view(line / "merged"))
    assert sizes["q6_k"][2] == file.tensors["token_embd.weight"].rows.nbytes
    assert sizes["6 bit, g 16, q6_k"][2] == file.tensors["blk.0.attn_v.weight"].rows.nbytes


def test_a_damaged_embedding_is_found(line: Path, tmp_path: Path) -> None:
    damaged = bytearray((line / "model.gguf").read_bytes())
    damaged[GgufFile(line / "model.gguf").tensors["token_embd.weight"].info.begin] ^= 1
    (tmp_path / "model.gguf").write_bytes(damaged)
    found = compare(FolderContents(CanonicalCheckpoint(line / "merged")), read_back(tmp_path / "model.gguf"))
    assert found.tensors == {f"{EMBEDDING}.weight": 1}


def test_onnx_holds_the_same_numbers(line: Path) -> None:
    merged, contents = CanonicalCheckpoint(line / "merged"), read_onnx(line / "onnx")
    assert compare(FolderContents(merged), contents).total == 0
    assert contents.tensor(f"{EMBEDDING}.weight").dtype == np.float32
    for module in (SIX_BITS, EIGHT_BITS):
        assert contents.stored_offset(module) is None  # symmetric: no second branch
        np.testing.assert_array_equal(
            contents.packed(module).unpack().dequantize(), merged.group_affine(module).dequantize()
        )


def test_an_embedding_in_blocks_is_held_against_the_model_it_was_quantized_from(line: Path) -> None:
    class Turned(ModelFolder):
        def tensor(self, name: str) -> np.ndarray:
            return super().tensor(name)[::-1] if name == f"{EMBEDDING}.weight" else super().tensor(name)

    base = CanonicalCheckpoint(line / "base")
    assert changed_weights(ModelFolder(line / "model"), base) == []
    (found,) = changed_weights(Turned(line / "model"), base)
    assert f"{EMBEDDING}: " in found
    assert "rows are not those of the model it was made from" in found


@pytest.mark.parametrize("entry", [[], {"bits": 6, "group_size": 16}, {"bits": 6, "group_size": 32, "grid": "q6_k"}])
def test_an_entry_that_contradicts_the_tensors_is_refused(line: Path, tmp_path: Path, entry: object) -> None:
    for path in (line / "merged").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["embeddings"][EMBEDDING] = entry
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((InputError, UnsafeInputError)):
        CanonicalCheckpoint(tmp_path)


def test_a_step_that_is_no_number_is_refused(line: Path, tmp_path: Path) -> None:
    for path in (line / "merged").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as handle:
        handle.seek(read_header(file)[f"{EMBEDDING}.scale_step"].begin)
        handle.write(b"\x00\x7c")
    with pytest.raises(InputError, match="NaN or infinite"):
        CanonicalCheckpoint(tmp_path).tensor(f"{EMBEDDING}.weight")


@pytest.mark.slow
def test_it_is_verified_on_every_runtime(tmp_path: Path) -> None:
    """With a head of its own: q6_k, which no adapter moves, and an embedding on q4_k."""
    make_line(tmp_path, tied=False)
    merged = CanonicalCheckpoint(tmp_path / "merged")
    assert (merged.grids["lm_head"].name, merged.embeddings[EMBEDDING][2].name) == ("q6_k", "q4_k")
    assert verified(tmp_path, tmp_path / "report") == {"pass"}
