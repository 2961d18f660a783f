"""The exported folder: structure of the graph, bytes, atomicity, refusals."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.canonical_writer import CanonicalWriter
from qalora_export.checkpoint.manifest import parent_of, read_manifest, verify_manifest
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.errors import InputError, ParityError
from qalora_export.formats.contents import FolderContents, compare
from qalora_export.formats.onnx.datafile import ALIGNMENT, DataFile
from qalora_export.formats.onnx.exact import exact_graph, exact_variant
from qalora_export.formats.onnx.export import export_onnx
from qalora_export.formats.onnx.read import read_back
from qalora_export.formats.streaming import row_blocks
from qalora_export.recipe import OnnxSettings
from qalora_export.safety import sha256_file
from tests.formats.onnx.helpers import node_types, prefill, proto
from tests.models import make_tiny_canonical, make_tiny_model
from tests.verify.exports import Exported

LINEARS, LAYERS = 7, 2


@pytest.fixture
def exported(exported: Exported) -> Path:
    return exported.onnx


def test_report_and_files(tiny_canonical: Path, tmp_path: Path) -> None:
    report = export_onnx(tiny_canonical, tmp_path / "onnx", OnnxSettings())
    assert report.differing == 0 and report.compared > 300_000
    assert report.types == {"MatMulNBits, 4 bits": LINEARS * LAYERS, "float16": 7}
    assert {path.relative_to(tmp_path / "onnx").as_posix() for path in report.files} == {
        "onnx/model.onnx",
        "onnx/model.onnx_data",
        "config.json",
        "generation_config.json",
        "genai_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "manifest.json",
    }
    assert report.bytes == sum(path.stat().st_size for path in (tmp_path / "onnx").rglob("*") if path.is_file())


def test_graph_passes_the_onnx_checker(exported: Path) -> None:
    onnx.checker.check_model(str(exported / "onnx/model.onnx"))
    model = proto(exported)
    assert model.ir_version == 10 and model.producer_name == "qalora-export"


def test_dimensions_have_the_names_that_transformers_js_makes_an_empty_cache_by(exported: Path) -> None:
    graph = proto(exported).graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output, *graph.value_info)
    }
    assert shapes["input_ids"] == ["batch_size", "sequence_length"]
    assert shapes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert shapes["past_key_values.1.value"] == ["batch_size", 2, "past_sequence_length", 32]
    assert shapes["present.1.value"] == ["batch_size", 2, "total_sequence_length", 32]
    names = {size for shape in shapes.values() for size in shape if isinstance(size, str)}
    assert names == {"batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"}


def test_configurations_for_browsers_are_the_checkpoint_s(exported: Path, tiny_canonical: Path) -> None:
    source = json.loads((tiny_canonical / "config.json").read_text())
    del source["quantization_config"]
    config = json.loads((exported / "config.json").read_text())
    assert config.pop("transformers.js_config") == {"dtype": "fp32", "use_external_data_format": True}
    assert config == source
    generation = json.loads((tiny_canonical / "generation_config.json").read_text())
    assert json.loads((exported / "generation_config.json").read_text()) == generation


def test_the_chat_template_is_in_one_place(exported: Path, tiny_canonical: Path) -> None:
    template = (tiny_canonical / "chat_template.jinja").read_text()
    assert json.loads((exported / "tokenizer_config.json").read_text())["chat_template"] == template
    assert not (exported / "chat_template.jinja").exists()


def test_a_checkpoint_without_generation_config_gets_one_from_its_config(tiny_canonical: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_canonical, tmp_path / "base")
    (tmp_path / "base/manifest.json").unlink()
    (tmp_path / "base/generation_config.json").unlink()
    export_onnx(tmp_path / "base", tmp_path / "onnx", OnnxSettings())
    config = json.loads((tiny_canonical / "config.json").read_text())
    generation = json.loads((tmp_path / "onnx/generation_config.json").read_text())
    assert generation == {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


def test_group_sums_are_shared_and_no_g_idx(exported: Path) -> None:
    """q, k, v share one GroupSum, gate and up another; o and down have their own."""
    types = node_types(exported)
    assert types.count("MatMulNBits") == LINEARS * LAYERS
    assert types.count("ReduceSum") == 4 * LAYERS + 1  # one more for the attention mask
    products = [node for node in proto(exported).graph.node if node.op_type == "MatMulNBits"]
    assert {len(node.input) for node in products} == {4}  # x, codes, scale, zero_points


def test_symmetric_tensors_have_no_group_sum_and_no_offset(tiny_model: Path, tmp_path: Path) -> None:
    make_tiny_canonical(tmp_path / "base", tiny_model, sym=True)
    export_onnx(tmp_path / "base", tmp_path / "onnx", OnnxSettings())
    contents = read_back(tmp_path / "onnx")
    assert node_types(tmp_path / "onnx").count("ReduceSum") == 1
    assert contents.offset_is_implied == set(contents.modules)


def test_every_weight_lies_page_aligned_in_the_data_file(exported: Path) -> None:
    for tensor in proto(exported).graph.initializer:
        if tensor.name.endswith((".codes", ".scale", ".remainder", ".weight")):
            entries = {entry.key: entry.value for entry in tensor.external_data}
            assert entries["location"] == "model.onnx_data" and int(entries["offset"]) % ALIGNMENT == 0


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model", tie_word_embeddings=True)
    make_tiny_canonical(tmp_path / "base", tmp_path / "model")
    export_onnx(tmp_path / "base", tmp_path / "onnx", OnnxSettings())
    names = [tensor.name for tensor in proto(tmp_path / "onnx").graph.initializer]
    assert names.count("model.embed_tokens.weight") == 1 and "lm_head.weight" not in names


def test_source_bytes_survive(exported: Path, tiny_canonical: Path) -> None:
    source, contents = CanonicalCheckpoint(tiny_canonical), read_back(exported)
    assert set(contents.others) == set(source.plain_names())
    for name in contents.others:
        assert contents.tensor(name).dtype == np.float16
        assert contents.tensor(name).tobytes() == source.tensor(name).tobytes()


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_large_tensors_are_compared_by_blocks_of_rows(
    name: str, exported: Path, tiny_canonical: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = partial(row_blocks, block_bytes=10_000)  # 19 rows of 128 values, so the last block is partial
    monkeypatch.setattr("qalora_export.formats.contents.row_blocks", blocks)
    source = FolderContents(CanonicalCheckpoint(tiny_canonical))
    clean = compare(source, read_back(exported))
    assert clean.equal and clean.values > 300_000
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    tensor = next(t for t in proto(copy).graph.initializer if t.name == name)
    entries = {entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"}
    with (copy / "onnx/model.onnx_data").open("r+b") as file:
        file.seek(entries["offset"] + entries["length"] - 1)
        last = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([last ^ 1]))
    assert compare(source, read_back(copy)).findings() == {name: 1}


def test_manifest_is_whole_and_names_its_parent(exported: Path, tiny_canonical: Path) -> None:
    manifest = read_manifest(exported)
    assert verify_manifest(exported) == [] and manifest["kind"] == "onnx"
    assert manifest["parents"][0]["sha256"] == parent_of(tiny_canonical, "checkpoint").sha256
    assert manifest["tensors"]["model.norm.weight"]["dtype"] == "float16"


def test_equal_inputs_give_equal_bytes(exported: Path, tiny_canonical: Path, tmp_path: Path) -> None:
    export_onnx(tiny_canonical, tmp_path / "elsewhere", OnnxSettings())
    for path in filter(Path.is_file, exported.rglob("*")):
        name = path.relative_to(exported)
        assert sha256_file(path) == sha256_file(tmp_path / "elsewhere" / name), name


def test_existing_output_is_refused_and_force_replaces(exported: Path, tiny_canonical: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists"):
        export_onnx(tiny_canonical, tmp_path / "out", OnnxSettings())
    export_onnx(tiny_canonical, tmp_path / "out", OnnxSettings(accuracy_level=1), force=True)
    assert read_back(tmp_path / "out").accuracy_level == 1


def test_output_inside_the_checkpoint_is_refused(tiny_canonical: Path) -> None:
    with pytest.raises(InputError, match="inside"):
        export_onnx(tiny_canonical, tiny_canonical / "onnx", OnnxSettings())


@pytest.mark.parametrize("victim", ["codes", "scale", "remainder", "weight"])
def test_a_byte_written_wrong_leaves_nothing(
    victim: str, tiny_canonical: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The read-back is not decoration: one flipped bit in one tensor and there is no folder."""
    add = DataFile.add

    def faulty(self: DataFile, name: str, array: np.ndarray) -> Any:
        if name.endswith((f"layers.1.mlp.up_proj.{victim}", f"norm.{victim}")):
            array = array.copy()
            array.reshape(-1)[:1].view(np.uint8)[0] ^= 1
        return add(self, name, array)

    monkeypatch.setattr(DataFile, "add", faulty)
    with pytest.raises(ParityError, match="differ"):
        export_onnx(tiny_canonical, tmp_path / "onnx", OnnxSettings())
    assert list(tmp_path.iterdir()) == []


def test_unsupported_architecture_lists_the_supported_ones(tiny_canonical: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_canonical, tmp_path / "base")
    (tmp_path / "base/manifest.json").unlink()  # which would refute the config before it is read
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(InputError, match="LlamaForCausalLM"):
        export_onnx(tmp_path / "base", tmp_path / "onnx", OnnxSettings())


def test_a_tensor_without_a_place_in_the_graph_is_refused(tmp_path: Path) -> None:
    """mobius-onnx drops mlp biases silently; the export must not."""
    make_tiny_model(tmp_path / "model", mlp_bias=True)
    make_tiny_canonical(tmp_path / "base", tmp_path / "model")
    with pytest.raises(InputError, match="no place"):
        export_onnx(tmp_path / "base", tmp_path / "onnx", OnnxSettings())
    assert not (tmp_path / "onnx").exists()


def test_missing_and_misshapen_tensors_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    def variant(name: str, change: Any) -> Path:
        folder = ModelFolder(tiny_model)
        with CanonicalWriter(tmp_path / name, folder.config, kind="base") as writer:
            for key, tensor in folder.tensors():
                if (changed := change(key, np.asarray(tensor))) is not None:
                    writer.add(key, changed)
        return tmp_path / name

    missing = variant("missing", lambda key, tensor: None if key == "model.norm.weight" else tensor)
    with pytest.raises(InputError, match="does not hold") as error:
        export_onnx(missing, tmp_path / "onnx", OnnxSettings())
    assert error.value.where == "model.norm.weight"
    short = variant("short", lambda key, tensor: tensor[:-1] if key == "model.norm.weight" else tensor)
    with pytest.raises(InputError, match=r"config\.json makes it"):
        export_onnx(short, tmp_path / "onnx", OnnxSettings())


def test_exact_variant_runs_and_shares_every_weight(exported: Path, tmp_path: Path) -> None:
    exact_variant(exported, tmp_path / "exact")
    assert read_back(exported).accuracy_level == 4
    assert read_back(tmp_path / "exact").accuracy_level == 1
    assert sha256_file(tmp_path / "exact/onnx/model.onnx_data") == sha256_file(exported / "onnx/model.onnx_data")
    assert (exported / "onnx/model.onnx_data").stat().st_nlink == 1
    ids = np.arange(12)[None]
    shipped, exact = prefill(exported, ids), prefill(tmp_path / "exact", ids)
    assert 0 < np.abs(shipped - exact).max() < 1  # int8 activations against float32


def test_exact_graph_runs_on_the_shipped_data_without_a_copy(exported: Path, tmp_path: Path) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(exported / "onnx"))
    runtime = ort.InferenceSession(exact_graph(exported), options, providers=["CPUExecutionProvider"])
    ids = np.arange(12)[None]
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feed |= {n.name: np.zeros((1, n.shape[1], 0, n.shape[3]), np.float32) for n in runtime.get_inputs()[2:]}
    expected = prefill(exact_variant(exported, tmp_path / "exact"), ids)
    assert np.array_equal(runtime.run(["logits"], feed)[0], expected)
