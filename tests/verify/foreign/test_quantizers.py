"""Graphs by ONNX Runtime's own quantizers: right ones are right in runtimes that fuse and round, damaged are named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
from onnxruntime.quantization.quant_utils import QuantFormat

from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.errors import ExitCode
from qalora_export.recipe import VerifySettings
from qalora_export.verify.foreign.metadata import complete_config
from qalora_export.verify.foreign.onnx_folder import Graph, open_onnx
from qalora_export.verify.foreign.onnx_values import Values
from qalora_export.verify.foreign.stage import diagnose
from qalora_export.verify.foreign.weights import Finding, compared
from tests.conftest import MadeOnce
from tests.verify.foreign.conftest import Plain

GRAPH, DATA = "model.onnx", "model.onnx.data"
Built = Callable[[str], Path]


def _blocks(model: onnx.ModelProto, _: Path, **options: Any) -> onnx.ModelProto:
    quantizer = MatMulNBitsQuantizer(model, algo_config=DefaultWeightOnlyQuantConfig(block_size=32, **options))
    with np.errstate(invalid="ignore"):  # it divides the padding's zeros by their scale
        quantizer.process()
    return quantizer.model.model


def _through_files(model: onnx.ModelProto, folder: Path, quantize: Callable[[Path, Path], None]) -> onnx.ModelProto:
    onnx.save(model, folder / "float.onnx")
    quantize(folder / "float.onnx", folder / "integer.onnx")
    found = onnx.load(folder / "integer.onnx")
    for name in ("float.onnx", "integer.onnx"):
        (folder / name).unlink()
    return found


def _dynamic(model: onnx.ModelProto, folder: Path, *, per_channel: bool, only: list[str] | None) -> onnx.ModelProto:
    options = {"weight_type": QuantType.QInt8, "per_channel": per_channel, "op_types_to_quantize": only}
    return _through_files(model, folder, lambda source, out: quantize_dynamic(source, out, **options))


class _Texts(CalibrationDataReader):
    """Some random texts, with an empty cache."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self._left = [random.integers(0, 300, (1, 32)) for _ in range(4)]

    def get_next(self) -> dict[str, np.ndarray] | None:
        if not self._left:
            return None
        empty = np.zeros((1, 2, 0, 64), np.float32)
        cache = {f"past_key_values.{layer}.{part}": empty for layer in range(2) for part in ("key", "value")}
        ids = self._left.pop()
        return {"input_ids": ids, "attention_mask": np.ones_like(ids), **cache}


def _static(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """Activations rounded to ranges that were seen in texts."""
    options = {"weight_type": QuantType.QInt8, "op_types_to_quantize": ["MatMul"]}
    return _through_files(model, folder, lambda source, out: quantize_static(source, out, _Texts(), **options))


# Name -> (what makes it of the float graph, what the matrices are stored as).
QUANTIZERS: dict[str, tuple[Callable[[onnx.ModelProto, Path], onnx.ModelProto], str]] = {
    "QDQ": (
        lambda m, at: _blocks(m, at, quant_format=QuantFormat.QDQ, is_symmetric=False),
        "int4 g32 offset",
    ),
    "int4 embedding": (
        lambda m, at: _blocks(m, at, is_symmetric=True, op_types_to_quantize=("MatMul", "Gather")),
        "int4 g32",
    ),
    "dynamic by channel": (lambda m, at: _dynamic(m, at, per_channel=True, only=["MatMul"]), "int8 g256 offset"),
    "dynamic by tensor": (lambda m, at: _dynamic(m, at, per_channel=False, only=["MatMul"]), "int8 g256 step "),
    "dynamic of everything": (lambda m, at: _dynamic(m, at, per_channel=False, only=None), "int8 g256 step "),
    "static": (_static, "int8 g256 step "),
}
EMBEDDINGS = {"int4 embedding": "int4 g32", "dynamic of everything": "int8 g256 step "}


@pytest.fixture(scope="module", params=QUANTIZERS)
def quantizer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(quantizer: str, built_by_genai: Callable[[str], Path], made_once: MadeOnce) -> Path:
    def make(place: Path) -> None:
        out = Path(shutil.copytree(built_by_genai("fp32"), place / "onnx"))
        model = onnx.load(out / GRAPH)
        (out / DATA).unlink()
        save(QUANTIZERS[quantizer][0](model, out), out)

    return made_once(f"by-{quantizer.replace(' ', '-')}", make) / "onnx"


def test_a_tied_embedding_is_read_from_the_codes_of_the_head(tmp_path: Path) -> None:
    """GenAI's builder gathers from the head's own codes, (out, blocks, bytes), through a Reshape."""
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (6, 2, 32)).astype(np.uint8)  # (out, blocks, block)
    scales = random.normal(size=(6, 2)).astype(np.float32)
    arrays = {"packed": codes[..., ::2] | codes[..., 1::2] << 4, "scales": scales, "shape": np.array([6, 32])}
    nodes = [
        onnx.helper.make_node("Reshape", ["packed", "shape"], ["flat"]),
        onnx.helper.make_node(
            "GatherBlockQuantized", ["flat", "ids", "scales"], ["x"], domain="com.microsoft", bits=4, block_size=32
        ),
    ]
    tensors = [numpy_helper.from_array(values, name) for name, values in arrays.items()]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "tied", [], [], tensors))
    found = Values(model, tmp_path).gathered(model.graph.node[1])
    assert found is not None
    assert (found.kind, found.stored_as) == ("int4 g32", "packed")
    want = (codes.astype(np.float32) - 8) * scales[..., None]
    np.testing.assert_array_equal(found.values, want.reshape(6, 64))


def test_an_embedding_under_the_name_of_the_head_that_shares_it_is_one(tmp_path: Path) -> None:
    """As torch's dynamo exporter leaves it."""
    ids = onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, [1, None])
    rows = onnx.helper.make_tensor_value_info("rows", onnx.TensorProto.FLOAT, [1, None, 4])
    node = onnx.helper.make_node("Gather", ["lm_head.weight", "ids"], ["rows"])
    tensor = numpy_helper.from_array(np.ones((6, 4), np.float32), "lm_head.weight")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "tied", [ids], [rows], [tensor])), tmp_path / GRAPH)
    assert [name for name, _ in Graph(tmp_path).constants()] == ["model.embed_tokens.weight"]


def test_a_norm_that_was_quantized_is_the_norm_it_was(tmp_path: Path) -> None:
    """As ONNX Runtime's static quantization of everything leaves a norm that a Mul spells out."""
    weight = "model.layers.0.input_layernorm.weight"
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4]) for name in "xy")
    parts = [f"{weight}_quantized", f"{weight}_scale", f"{weight}_zero_point"]
    arrays = np.array([-2, 0, 1, 100], np.int8), np.array(0.5, np.float32), np.array(0, np.int8)
    nodes = [
        onnx.helper.make_node("DequantizeLinear", parts, [f"{weight}_DequantizeLinear_Output"]),
        onnx.helper.make_node("Mul", [f"{weight}_DequantizeLinear_Output", "x"], ["y"]),
    ]
    tensors = [numpy_helper.from_array(values, name) for values, name in zip(arrays, parts, strict=True)]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "norm", [x], [y], tensors)), tmp_path / GRAPH)
    ((name, found),) = Graph(tmp_path).constants()
    assert name == weight
    np.testing.assert_array_equal(found.values, [-1, 0, 0.5, 50])


def save(model: onnx.ModelProto, folder: Path) -> None:
    (folder / DATA).unlink(missing_ok=True)
    onnx.save(model, folder / GRAPH, save_as_external_data=True, location=DATA, size_threshold=0)


def looked_at(plain: Plain, folder: Path) -> list[Finding]:
    source = ModelFolder(plain.model)
    artifact = open_onnx(Graph(folder), complete_config(plain.model), set(source.names()))
    assert not artifact.absent
    return compared(artifact, source, {"q_proj": 4, "k_proj": 2})


def test_right_weights_are_right(quantizer: str, folder: Path, plain: Plain) -> None:
    found = looked_at(plain, folder)
    assert [finding for finding in found if finding.cause] == []
    kinds = {finding.name: finding.kind for finding in found}
    assert len(kinds) == 21
    assert kinds["model.layers.1.mlp.up_proj.weight"].startswith(QUANTIZERS[quantizer][1])
    assert kinds["model.embed_tokens.weight"].startswith(EMBEDDINGS.get(quantizer, "F32"))


def test_a_damaged_scale_and_swapped_layers_are_named(folder: Path, plain: Plain, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "onnx"))
    model = onnx.load(copy / GRAPH)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    scale = next(name for name in tensors if "layers.1.attn.o_proj" in name and "scale" in name)
    values = numpy_helper.to_array(tensors[scale]) * np.float32(1.1)
    tensors[scale].CopyFrom(numpy_helper.from_array(values, scale))
    for name in [name for name in tensors if "layers.0.mlp.up_proj" in name]:
        one, other = tensors[name], tensors[name.replace("layers.0", "layers.1")]
        first, second = one.name, other.name
        kept = onnx.TensorProto.FromString(one.SerializeToString())
        one.CopyFrom(other)
        other.CopyFrom(kept)
        one.name, other.name = first, second
    save(model, copy)
    causes = {finding.name: finding.cause for finding in looked_at(plain, copy) if finding.cause}
    assert set(causes) == {
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    }
    assert "multiplied by 1." in causes["model.layers.1.self_attn.o_proj.weight"]
    assert "holds the numbers of model.layers.1.mlp.up_proj" in causes["model.layers.0.mlp.up_proj.weight"]


def with_step(folder: Path, step: float) -> str:
    """The activation that QuantizeLinear rounds in this step afterwards."""
    model = onnx.load(folder / GRAPH)
    rounding = [node for node in model.graph.node if node.op_type == "QuantizeLinear"][3]
    (scale,) = (tensor for tensor in model.graph.initializer if tensor.name == rounding.input[1])
    scale.CopyFrom(numpy_helper.from_array(np.array(step, np.float32), scale.name))
    save(model, folder)
    return str(rounding.input[0])


@pytest.mark.parametrize("quantizer", ["static"], indirect=True)
def test_ranges_without_a_size_are_seen(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "onnx"))
    assert Graph(copy).steps_of_no_size() == []
    for step, said in ((np.inf, "inf"), (np.nan, "nan"), (0.0, "0"), (-1.0, "-1")):
        rounded = with_step(copy, step)
        assert Graph(copy).steps_of_no_size() == [f"{rounded} ({said})"]


@pytest.mark.parametrize("quantizer", ["static"], indirect=True)
def test_a_range_without_a_size_is_named(folder: Path, plain: Plain, tmp_path: Path) -> None:
    """What calibration makes of the −∞ in an attention mask."""
    copy = Path(shutil.copytree(folder, tmp_path / "onnx"))
    rounded = with_step(copy, np.inf)
    found = diagnose(plain.model, tmp_path / "report", VerifySettings(threads=1), onnx=copy)
    assert found.exit_code == ExitCode.PARITY_FAILED
    states = {part.id: part for part in found.parts}
    assert f"rounded in steps of no size: {rounded} (inf)" in states["graph"].sentence
    assert states["graph"].proof.startswith("without rounding: its own numbers in Transformers")
    assert states["weights"].state == "ok"


def test_a_number_that_is_none_is_named_and_nothing_fails_on_it(
    plain: Plain, built_by_genai: Built, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(built_by_genai("fp32"), tmp_path / "onnx"))
    model = onnx.load(copy / GRAPH)
    tensor = next(t for t in model.graph.initializer if "layers.0.mlp.up_proj" in t.name)
    values = numpy_helper.to_array(tensor).copy()
    values[3, 5] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    save(model, copy)
    found = diagnose(plain.model, tmp_path / "report", VerifySettings(threads=1), onnx=copy)
    assert "model.layers.0.mlp.up_proj.weight (F32): holds NaN or infinite values" in found.sentence
    states = {part.id: part for part in found.parts}
    assert "its own numbers give NaN or infinite logits, first at" in states["graph"].sentence
    assert "even without rounding it gives NaN or infinite logits" in states["kernels"].sentence


def test_nothing_is_broken_where_the_runtime_fuses_and_rounds(folder: Path, plain: Plain, tmp_path: Path) -> None:
    found = diagnose(plain.model, tmp_path / "report", VerifySettings(threads=1), onnx=folder)
    assert found.exit_code == ExitCode.OK, found.sentence
    assert found.sentence.startswith("Nothing is broken: this is what int")
    assert " step " not in found.sentence
