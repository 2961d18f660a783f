"""A model on a grid of super-blocks goes the whole line, beside modules whose in-features 256 does not divide."""

import json
from pathlib import Path

import numpy as np
import pytest

import qalora_export as q
from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.safetensors_file import read_header
from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.formats.contents import FolderContents, compare
from qalora_export.formats.gguf.file import GgufFile
from qalora_export.formats.gguf.read import read_back
from qalora_export.formats.gguf.types import Q4_K
from qalora_export.formats.onnx.read import read_back as read_onnx
from qalora_export.formats.patch.apply import apply
from qalora_export.formats.patch.export import export_patch
from qalora_export.grid import AFFINE16, Differences, differing
from qalora_export.inspection.view import byte_table, open_view
from qalora_export.recipe import GgufSettings, QuantizeRule
from qalora_export.verify.reference.merge_check import merge_check
from tests.conftest import MadeOnce
from tests.models import make_tiny_model
from tests.verify.exports import verified

pytestmark = pytest.mark.usefixtures("warm_runners")
WIDTHS = {"hidden_size": 256, "intermediate_size": 320, "head_dim": 64, "num_attention_heads": 4}
QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def line(made_once: MadeOnce) -> Path:
    """model, base, adapter of two steps, merged, model.gguf and onnx."""

    def make(folder: Path) -> None:
        report = make_line(folder)
        assert report.notes == (falls_back(2, "q4_k"),)
        assert 0 < report.bits_per_weight - 4.5 < 0.3

    return made_once("super", make)


def make_line(folder: Path, grid: str = "q4_k", rules: tuple[QuantizeRule, ...] = ()) -> q.QuantizeReport:
    make_tiny_model(folder / "model", **WIDTHS)
    rows = [{"prompt": f"turn on {n}", "completion": f"on {n}"} for n in range(8)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = q.QuantizeSettings(
        grid=grid,
        rules=rules,
        calibration=str(folder / "data.jsonl"),
        calibration_samples=4,
        sequence_length=64,
        sweeps=1,
    )
    report = q.quantize(folder / "model", folder / "base", settings)
    training = q.TrainSettings(data=str(folder / "data.jsonl"), rank=2, max_steps=2, batch_size=4, learning_rate=1e-2)
    q.train(folder / "base", folder / "adapter", training)
    merged = q.merge(folder / "base", folder / "adapter", folder / "merged")
    assert (merged.changed_codes, merged.changed_scales, merged.logits_differing) == (0, 0, 0)
    assert 0 < merged.changed_offsets < merged.offsets
    q.export_gguf(folder / "merged", folder / "model.gguf")
    q.export_onnx(folder / "merged", folder / "onnx")
    return report


def falls_back(count: int, grid: str) -> str:
    """What the plan says of `count` down_proj."""
    return (
        f"{count} × down_proj: grid affine16 instead of {grid}, 320 in-features do not divide into super-blocks of 256"
    )


def test_grids_of_the_modules_and_what_the_report_says(line: Path) -> None:
    base, merged = CanonicalCheckpoint(line / "base"), CanonicalCheckpoint(line / "merged")
    assert {name.rpartition(".")[2]: grid.name for name, grid in merged.grids.items()} == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), "q4_k"),
        "down_proj": "affine16",
    }
    assert base.grids == merged.grids
    rows = {row["name"]: row for row in json.loads((line / "base/quantize_report.json").read_text())["modules"]}
    assert (rows[QUERY]["grid"], rows[QUERY]["bits_per_weight"]) == ("q4_k", 4.5)
    assert "grid" not in rows[DOWN]
    entry = merged.config["quantization_config"]["modules"]
    assert entry[QUERY] == {"bits": 4, "group_size": 32, "grid": "q4_k"}
    assert entry[DOWN] == {"bits": 4, "group_size": 32}


def test_the_merge_is_recomputed_apart(line: Path, tmp_path: Path) -> None:
    found = merge_check(CanonicalCheckpoint(line / "merged"), base=line / "base")
    assert (found.wrong, found.adapted) == ({}, 14)
    assert merge_check(CanonicalCheckpoint(line / "merged"), base=line / "merged").wrong


def test_scales_are_trained_merged_exported_and_patched_too(line: Path, tmp_path: Path) -> None:
    training = q.TrainSettings(
        data=str(line / "data.jsonl"), rank=2, max_steps=2, batch_size=4, learning_rate=1e-2, scales=True
    )
    q.train(line / "base", tmp_path / "adapter", training)
    merged = q.merge(line / "base", tmp_path / "adapter", tmp_path / "merged")
    assert (merged.changed_codes, merged.changed_other_tensors, merged.logits_differing) == (0, 0, 0)
    assert merged.scales_trained and merged.changed_scales and merged.changed_offsets
    checkpoint = CanonicalCheckpoint(tmp_path / "merged")
    assert differing(checkpoint.tensor(f"{QUERY}.scale"), CanonicalCheckpoint(line / "base").tensor(f"{QUERY}.scale"))
    found = merge_check(checkpoint, base=line / "base", adapter=tmp_path / "adapter")
    assert (found.wrong, found.adapted) == ({}, 14)
    assert merge_check(checkpoint, base=line / "base", adapter=line / "adapter").wrong
    q.export_gguf(tmp_path / "merged", tmp_path / "model.gguf")
    q.export_onnx(tmp_path / "merged", tmp_path / "onnx")
    for contents in (read_back(tmp_path / "model.gguf"), read_onnx(tmp_path / "onnx")):
        assert compare(FolderContents(checkpoint), contents).total == 0
    for name in ("model.gguf", "onnx"):
        export_patch(line / name, tmp_path / name, tmp_path / "patch", force=True)
        apply(tmp_path / "patch", line / name, tmp_path / "patched" / name)
    assert (tmp_path / "patched/model.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()


def test_gguf_holds_levels_and_steps_byte_for_byte(line: Path, tmp_path: Path) -> None:
    merged, file = CanonicalCheckpoint(line / "merged"), GgufFile(line / "model.gguf")
    assert {file.tensors[f"blk.0.{name}.weight"].kind for name in ("attn_q", "attn_output", "ffn_up")} == {"Q4_K"}
    assert file.tensors["blk.0.ffn_down.weight"].kind == "Q4_1"
    tensor = file.tensors["blk.0.ffn_up.weight"]
    assert np.array_equal(tensor.rows, Q4_K.pack(merged.packed("model.layers.0.mlp.up_proj")))
    assert compare(FolderContents(merged), read_back(line / "model.gguf")).total == 0
    blocks = [other.rows.nbytes for other in file.tensors.values() if other.kind == "Q4_K"]
    assert byte_table(open_view(line / "model.gguf"))["4 bit, g 32, q4_k"][::2] == (len(blocks), sum(blocks))
    assert byte_table(open_view(line / "onnx")) == byte_table(open_view(line / "merged"))
    for at, expected in ((0, Differences(0, 1, 0)), (2, Differences(0, 0, 1)), (16, Differences(1, 0, 0))):
        damaged = bytearray((line / "model.gguf").read_bytes())
        damaged[tensor.info.begin + at] ^= 1
        (tmp_path / "model.gguf").write_bytes(damaged)
        found = compare(FolderContents(merged), read_back(tmp_path / "model.gguf"))
        assert found.matrices == {"model.layers.0.mlp.up_proj": expected}


def test_onnx_holds_the_products(line: Path) -> None:
    merged, contents = CanonicalCheckpoint(line / "merged"), read_onnx(line / "onnx")
    assert contents.grids == {name: grid for name, grid in merged.grids.items() if grid is not AFFINE16}
    assert compare(FolderContents(merged), contents).total == 0
    packed = contents.packed(QUERY)
    assert packed.levels is None
    np.testing.assert_array_equal(packed.unpack().dequantize(), merged.group_affine(QUERY).dequantize())
    other = compare(FolderContents(CanonicalCheckpoint(line / "base")), contents)
    assert other.changes.codes == other.changes.scale == 0 < other.changes.offset


def test_what_a_grid_of_super_blocks_does_not_do(line: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="layout split does not hold grid q4_k"):
        q.export_gguf(line / "merged", tmp_path / "m.gguf", GgufSettings(layout="split"))
    with pytest.raises(InputError, match="an adapter file is not what was trained over grid q4_k"):
        from qalora_export.qalora.export_adapter import export_gguf_adapter

        export_gguf_adapter(line / "base", line / "adapter", tmp_path / "a.gguf")
    with pytest.raises(InputError, match=r"320 in-features do not divide into super-blocks of 256"):
        q.quantize(line / "model", tmp_path / "b", q.QuantizeSettings(method="rtn", grid="q4_k", strict_groups=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        (f"{QUERY}.scale", b"\xff", "a level is above 63"),
        (f"{QUERY}.offset_step", b"\x00\x7c", "NaN or infinite"),
    ],
)
def test_damaged_levels_are_refused(line: Path, tmp_path: Path, tensor: str, change: bytes, message: str) -> None:
    for path in (line / "merged").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as handle:
        handle.seek(read_header(file)[tensor].begin)
        handle.write(change)
    with pytest.raises(InputError, match=message):
        CanonicalCheckpoint(tmp_path).packed(QUERY)


@pytest.mark.parametrize(
    "entry",
    [
        {"bits": 4, "group_size": 32},
        {"bits": 4, "group_size": 32, "grid": "q9_k"},
        {"bits": 4, "group_size": 32, "grid": ["q4_k"]},
        {"bits": 3, "group_size": 32, "grid": "q4_k"},
        {"bits": 4, "group_size": 64, "grid": "q4_k"},
    ],
)
def test_an_entry_that_contradicts_the_tensors_is_refused(line: Path, tmp_path: Path, entry: object) -> None:
    for path in (line / "merged").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["modules"][QUERY] = entry
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((InputError, UnsafeInputError)):
        CanonicalCheckpoint(tmp_path)


@pytest.mark.slow
def test_it_is_verified_on_every_runtime(line: Path, tmp_path: Path) -> None:
    assert verified(line, tmp_path / "report") == {"pass"}


@pytest.mark.slow
def test_other_bits_go_the_same_way(tmp_path: Path) -> None:
    """Groups of 16, which no other grid has in GGUF, in one layer; codes of 5 bits in the other; 320 in-features fall
    back to a free grid.
    """
    report = make_line(tmp_path, "q2_k", (QuantizeRule(match="model.layers.1.*", grid="q5_k"),))
    assert set(report.notes) == {falls_back(1, "q2_k"), falls_back(1, "q5_k")}
    assert 0 < report.bits_per_weight - (2.625 + 5.5) / 2 < 0.3
    merged, other_query = CanonicalCheckpoint(tmp_path / "merged"), QUERY.replace("layers.0", "layers.1")
    assert (merged.modules[QUERY], merged.grids[QUERY].name) == ((2, 16), "q2_k")
    assert (merged.modules[other_query], merged.grids[other_query].name) == ((5, 32), "q5_k")
    assert (merged.modules[DOWN.replace("layers.1", "layers.0")], merged.modules[DOWN]) == ((2, 32), (5, 32))
    types = {tensor.kind for tensor in GgufFile(tmp_path / "model.gguf").tensors.values()}
    assert types >= {"Q2_K", "Q4_1", "Q5_K", "Q5_1"}
    assert merge_check(merged, base=tmp_path / "base").wrong == {}
    assert verified(tmp_path, tmp_path / "report") == {"pass"}
