"""verify-parity on ONNX folders of Microsoft Olive: right ones are right; what Olive or a test breaks is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qalora_export.errors import ExitCode
from qalora_export.recipe import VerifySettings
from qalora_export.verify.foreign.report import Diagnosis
from qalora_export.verify.foreign.stage import diagnose
from tests.models.families.small import make_small
from tests.real.olive import run, with_tokenizer

Pass = Mapping[str, Any]
FLOAT: Pass = {"type": "ModelBuilder", "precision": "fp32"}
INT4: Pass = {"type": "ModelBuilder", "precision": "int4"}
TORCH: Pass = {"type": "OnnxConversion", "use_dynamo_exporter": True}
DATA = {  # ones: what calibration sees decides how good a file is, not whether it is right
    "name": "calibration",
    "type": "DummyDataContainer",
    "load_dataset_config": {
        "params": {
            "input_names": ["input_ids", "attention_mask"],
            "input_shapes": [[1, 64], [1, 64]],
            "input_types": ["int64", "int64"],
            "max_samples": 4,
        }
    },
}
STATIC: Pass = {"type": "OnnxStaticQuantization", "data_config": DATA}
OPTIMUM: Pass = {"type": "OptimumConversion", "extra_args": {"task": "text-generation-with-past"}}
# Name -> (passes, what most of its numbers are stored as).
RIGHT: Mapping[str, tuple[tuple[Pass, ...], str]] = {
    "builder": ((INT4,), "int4 g32"),
    "builder, QDQ": ((INT4, {"type": "MatMulNBitsToQDQ"}), "int4 g32 offset"),
    "builder, k-quant": ((FLOAT, {"type": "OnnxKQuantQuantization"}), "int4 g32 offset"),
    "builder, dynamic": ((FLOAT, {"type": "OnnxDynamicQuantization"}), "int8 g256 offset"),
    "RTN in PyTorch, builder": (({"type": "Rtn", "bits": 4, "group_size": 32}, INT4), "int4 g32 offset"),
    "GPTQ in PyTorch, builder": (
        ({"type": "Gptq", "bits": 4, "group_size": 32, "data_config": DATA}, INT4),
        "int4 g32 offset",
    ),
    "torch": ((TORCH,), "F32"),
    "torch, k-quant": ((TORCH, {"type": "OnnxKQuantQuantization"}), "int4 g32 offset"),
    "torch, dynamic": ((TORCH, {"type": "OnnxDynamicQuantization"}), "int8 g256 offset"),
    "Optimum": ((OPTIMUM,), "F32"),
    "Optimum, k-quant": ((OPTIMUM, {"type": "OnnxKQuantQuantization"}), "int4 g32 offset"),
}
Make = Callable[..., Path]


def small(folder: Path, family: str) -> Path:
    """With the RoPE base where Transformers 4, which Olive runs on, looks for it, too."""
    make_small(folder, family, hidden_size=256, intermediate_size=512)
    base = "rope_theta"
    return _edited(folder, "config.json", lambda config: config.update({base: config["rope_parameters"][base]}))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("olive") / "model", "Llama")


@pytest.fixture(scope="session")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """passes -> the folder that Olive makes of `model`, as Olive leaves it; read-only."""
    kept = dict[str, Path]()

    def of(*passes: Pass) -> Path:
        key = json.dumps(passes)
        if key not in kept:
            kept[key] = run(model, tmp_path_factory.mktemp("made") / "onnx", *passes)
        return kept[key]

    return of


def of(model: Path, folder: Path, out: Path) -> Diagnosis:
    return diagnose(model, out / "report", VerifySettings(threads=1), onnx=folder)


@pytest.mark.parametrize("name", RIGHT)
def test_what_olive_makes_is_right(name: str, made: Make, model: Path, tmp_path: Path) -> None:
    passes, kind = RIGHT[name]
    folder = with_tokenizer(Path(shutil.copytree(made(*passes), tmp_path / "onnx")), model)
    found = of(model, folder, tmp_path)
    assert found.exit_code == ExitCode.OK, found.sentence
    assert found.sentence.startswith(f"Nothing is broken: this is what {kind} costs here")
    assert len(found.tensors) == 21


@pytest.mark.parametrize("family", ["Granite", "OLMo-2", "Phi-3", "Qwen2", "Qwen3"])
def test_products_without_names_are_told_in_every_family(family: str, tmp_path: Path) -> None:
    """Tied heads, biases, norms of heads, norms behind instead of before, packed projections, multipliers."""
    model = small(tmp_path / "model", family)
    folder = with_tokenizer(run(model, tmp_path / "onnx", *RIGHT["torch, k-quant"][0]), model)
    found = of(model, folder, tmp_path)
    assert found.exit_code == ExitCode.OK, found.sentence


def test_a_graph_without_a_tokenizer_is_judged_by_its_numbers(made: Make, model: Path, tmp_path: Path) -> None:
    found = of(model, made(TORCH), tmp_path)
    assert found.exit_code == ExitCode.RUNTIME_UNAVAILABLE
    assert [part.id for part in found.parts if part.state == "ok"] == ["weights", "graph", "kernels"]
    assert "the folder has no tokenizer" in found.sentence


@pytest.mark.parametrize("first", [FLOAT, TORCH], ids=["builder", "torch"])
def test_rtn_of_the_head_renames_the_logits(first: Pass, made: Make, model: Path, tmp_path: Path) -> None:
    """No runtime finds them; in a copy with the right name everything else is looked at."""
    folder = Path(shutil.copytree(made(first, {"type": "OnnxBlockWiseRtnQuantization"}), tmp_path / "onnx"))
    found = of(model, with_tokenizer(folder, model), tmp_path)
    assert [part.id for part in found.parts if part.state == "broken"] == ["graph"]
    assert "the output that holds the logits is named 'logits_Q4'" in found.sentence
    (graph,) = (part for part in found.parts if part.id == "graph")
    assert graph.proof.startswith("in a copy that has this name: its own numbers in Transformers and in onnxruntime")


def test_hqq_packs_numbers_of_no_tensor(made: Make, model: Path, tmp_path: Path) -> None:
    """Along the other axis than MatMulNBits reads; the runtime agrees with what is read here."""
    found = of(model, made(FLOAT, {"type": "OnnxHqqQuantization", "block_size": 32}), tmp_path)
    assert "holds the numbers of no tensor of this model" in found.sentence
    assert len([tensor for tensor in found.tensors if tensor.cause]) == 15
    assert found.figures["exact path in onnxruntime-genai"]["kl"] > 5


def test_static_quantization_rounds_the_rotary_tables(made: Make, model: Path, tmp_path: Path) -> None:
    """Into one range for all of them, in 8 bits; the rest is what such rounding costs."""
    found = of(model, made(FLOAT, STATIC), tmp_path)
    assert [part.id for part in found.parts if part.state == "broken"] == ["graph"]
    assert "rotary tables in int8" in found.sentence


def test_static_quantization_gives_an_attention_mask_no_range(made: Make, model: Path, tmp_path: Path) -> None:
    """The mask that torch writes out has a −∞, and its step is infinite: nothing comes out."""
    found = of(model, with_tokenizer(made(OPTIMUM, STATIC), model), tmp_path)
    assert found.exit_code == ExitCode.PARITY_FAILED
    assert "The graph and metadata are broken: activations are rounded in steps of no size: " in found.sentence
    assert "Where" in found.sentence and "(inf)" in found.sentence
    (kernels,) = (part for part in found.parts if part.id == "kernels")
    assert "with activations rounded to the ranges of the file it gives NaN" in kernels.sentence


def test_a_graph_without_a_cache_is_no_graph_to_generate_with(made: Make, model: Path, tmp_path: Path) -> None:
    found = of(model, made({**OPTIMUM, "extra_args": {"task": "text-generation"}}), tmp_path)
    (graph,) = (part for part in found.parts if part.id == "graph")
    assert graph.sentence.startswith("the graph has no KV cache")
    assert "text-generation-with-past" in found.sentence


def test_a_rope_base_that_transformers_4_does_not_find_is_named(made: Make, model: Path, tmp_path: Path) -> None:
    """Transformers 5 writes it into rope_parameters, and the one before it takes 10,000 then, without a word."""
    newer = Path(shutil.copytree(model, tmp_path / "newer"))
    _edited(newer, "config.json", lambda config: config.pop("rope_theta"))
    found = of(model, with_tokenizer(run(newer, tmp_path / "onnx", TORCH), model), tmp_path)
    assert [part.id for part in found.parts if part.state == "broken"] == ["graph"]
    assert "rotary tables (radians per position) is [1.0, 0.749894," in found.sentence


def _edited(folder: Path, name: str, edit: Callable[[dict[str, Any]], object]) -> Path:
    table = json.loads((folder / name).read_text(encoding="utf-8"))
    edit(table)
    (folder / name).write_text(json.dumps(table), encoding="utf-8")
    return folder


def _graph(folder: Path, change: Callable[[list[onnx.NodeProto], dict[str, onnx.TensorProto]], None]) -> None:
    graph = onnx.load(folder / "model.onnx")
    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    products = [node for node in graph.graph.node if node.op_type == "MatMulNBits"]
    change(products, tensors)
    (folder / "model.onnx.data").unlink(missing_ok=True)
    onnx.save(graph, folder / "model.onnx")


def _block(folder: Path) -> None:
    """Every code of one block is another."""

    def change(products: list[onnx.NodeProto], tensors: dict[str, onnx.TensorProto]) -> None:
        packed = tensors[products[4].input[1]]
        codes = numpy_helper.to_array(packed).copy()
        codes[7, 1] ^= 0xFF
        packed.CopyFrom(numpy_helper.from_array(codes, packed.name))

    _graph(folder, change)


def _swap(folder: Path) -> None:
    """Two layers' products of the same place change their weights."""

    def change(products: list[onnx.NodeProto], tensors: dict[str, onnx.TensorProto]) -> None:
        half = (len(products) - 1) // 2
        for mine, theirs in zip(products[half - 1].input[1:], products[2 * half - 1].input[1:], strict=True):
            one, other = (numpy_helper.to_array(tensors[name]) for name in (mine, theirs))
            tensors[mine].CopyFrom(numpy_helper.from_array(other, mine))
            tensors[theirs].CopyFrom(numpy_helper.from_array(one, theirs))

    _graph(folder, change)


def _rotary(folder: Path) -> None:
    """Another RoPE base, in tables or in the constant that angles are computed from."""
    powers = 10000.0 ** -(np.arange(32) / 32)

    def change(_: list[onnx.NodeProto], tensors: dict[str, onnx.TensorProto]) -> None:
        for name, turned in (("cos_cache", np.cos), ("sin_cache", np.sin)):
            if name in tensors:
                values = turned(np.arange(256)[:, None] * powers).astype(np.float32)
                tensors[name].CopyFrom(numpy_helper.from_array(values, name))
        for tensor in tensors.values():
            if tensor.data_type == onnx.TensorProto.FLOAT and np.prod(tensor.dims) == 32:
                values = powers.astype(np.float32).reshape(tuple(tensor.dims))
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    _graph(folder, change)


def _merges(folder: Path) -> None:
    def halved(table: dict[str, Any]) -> None:
        table["model"]["merges"] = table["model"]["merges"][: len(table["model"]["merges"]) // 2]

    _edited(folder, "tokenizer.json", halved)


def _eos(folder: Path) -> None:
    if (folder / "genai_config.json").exists():
        _edited(folder, "genai_config.json", lambda table: table["model"].update(eos_token_id=70))
    _edited(folder, "generation_config.json", lambda table: table.update(eos_token_id=70))


DAMAGES: Mapping[str, tuple[Callable[[Path], None], str, str]] = {
    "one block": (_block, "weights", "1 of "),
    "two layers swapped": (_swap, "weights", "holds the numbers of model.layers.1.mlp.down_proj.weight"),
    "RoPE base": (_rotary, "graph", "rotary tables"),
    "merges cut": (_merges, "tokenizer", "merges"),
    "EOS": (_eos, "ends", "it does not stop at"),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("source", ["builder", "torch, k-quant"])
def test_a_damaged_folder_is_named(source: str, name: str, made: Make, model: Path, tmp_path: Path) -> None:
    damage, part, said = DAMAGES[name]
    folder = with_tokenizer(Path(shutil.copytree(made(*RIGHT[source][0]), tmp_path / "onnx")), model)
    damage(folder)
    found = of(model, folder, tmp_path)
    assert [each.id for each in found.parts if each.state == "broken"] == [part], found.sentence
    assert said in found.sentence
