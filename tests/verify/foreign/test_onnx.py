"""Folders that GenAI's own builder made: right ones, and each of their parts damaged."""

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

from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.errors import ExitCode, InputError
from qalora_export.recipe import VerifySettings
from qalora_export.verify.foreign.metadata import complete_config
from qalora_export.verify.foreign.onnx_folder import Graph, open_onnx
from qalora_export.verify.foreign.report import Diagnosis
from qalora_export.verify.foreign.sides import OnnxSide
from qalora_export.verify.foreign.stage import diagnose
from qalora_export.verify.foreign.weights import compared
from tests.verify.foreign.conftest import Plain

Damage = Callable[[Path], None]


@pytest.fixture(scope="session", params=["int4", "fp32"])
def built(request: pytest.FixtureRequest, built_by_genai: Callable[[str], Path]) -> Path:
    return built_by_genai(request.param)


def of(plain: Plain, folder: Path, out: Path) -> Diagnosis:
    return diagnose(plain.model, out, VerifySettings(threads=1), onnx=folder)


@pytest.mark.parametrize("built", ["int4"], indirect=True)
def test_a_right_folder_is_right(built: Path, plain: Plain, tmp_path: Path) -> None:
    found = of(plain, built, tmp_path / "report")
    assert found.exit_code == ExitCode.OK, found.sentence
    assert found.sentence.startswith("Nothing is broken: this is what ")
    assert len(found.tensors) == 21  # q, k and v one by one


def _graph(folder: Path, change: Callable[[dict[str, onnx.TensorProto], onnx.ModelProto], None]) -> None:
    model = onnx.load(folder / "model.onnx")
    change({tensor.name: tensor for tensor in model.graph.initializer}, model)
    (folder / "model.onnx.data").unlink()
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)


def _values(tensor: onnx.TensorProto, values: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))


def _swap(folder: Path) -> None:
    def change(tensors: dict[str, onnx.TensorProto], _: onnx.ModelProto) -> None:
        for name, tensor in tensors.items():
            if "layers.0.mlp.up_proj" in name:
                other = tensors[name.replace("layers.0", "layers.1")]
                mine, theirs = numpy_helper.to_array(tensor), numpy_helper.to_array(other)
                _values(tensor, theirs)
                _values(other, mine)

    _graph(folder, change)


def _scale(folder: Path) -> None:
    def change(tensors: dict[str, onnx.TensorProto], _: onnx.ModelProto) -> None:
        name = next(n for n in tensors if "layers.1.attn.o_proj" in n and n.endswith(("scales", "weight")))
        _values(tensors[name], numpy_helper.to_array(tensors[name]) * np.float32(1.1))

    _graph(folder, change)


def _epsilon(folder: Path) -> None:
    def change(_: dict[str, onnx.TensorProto], model: onnx.ModelProto) -> None:
        for attribute in (a for node in model.graph.node for a in node.attribute if a.name == "epsilon"):
            attribute.f = 1e-3

    _graph(folder, change)


def _rotary(folder: Path) -> None:
    def change(tensors: dict[str, onnx.TensorProto], _: onnx.ModelProto) -> None:
        cos = numpy_helper.to_array(tensors["cos_cache"])
        steps = np.arange(cos.shape[1], dtype=np.float64) / cos.shape[1]
        angles = np.arange(len(cos))[:, None] * 10000.0**-steps
        _values(tensors["cos_cache"], np.cos(angles).astype(np.float32))
        _values(tensors["sin_cache"], np.sin(angles).astype(np.float32))

    _graph(folder, change)


def _json(name: str, edit: Callable[[dict[str, Any]], None]) -> Damage:
    def damage(folder: Path) -> None:
        table = json.loads((folder / name).read_text(encoding="utf-8"))
        edit(table)
        (folder / name).write_text(json.dumps(table), encoding="utf-8")

    return damage


def _template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8") + "!", encoding="utf-8")


DAMAGES: Mapping[str, tuple[Damage, str, str]] = {
    "two layers swapped": (_swap, "weights", "holds the numbers of model.layers.1.mlp.up_proj"),
    "one matrix × 1.1": (_scale, "weights", "multiplied by 1."),
    "epsilon": (_epsilon, "graph", "epsilon of the norms is 0.001"),
    "rotary tables": (_rotary, "graph", "rotary tables"),
    "merges cut": (_json("tokenizer.json", lambda t: t["model"]["merges"].pop(3)), "tokenizer", "merges"),
    "template": (_template, "template", "instead of"),
    "EOS": (_json("genai_config.json", lambda t: t["model"].update(eos_token_id=70)), "ends", "does not stop at"),
    "sampling": (
        _json("genai_config.json", lambda t: t["search"].update(do_sample=True, temperature=3.0, top_k=50)),
        "ends",
        "do_sample is true",
    ),
    "max_length": (_json("genai_config.json", lambda t: t["search"].update(max_length=8)), "ends", "max_length is 8"),
}
WHOLE = ("rotary tables", "merges cut", "EOS")  # the others differ by what is read, not by what is run
WEIGHTS = [name for name, (_, part, _) in DAMAGES.items() if part == "weights"]


@pytest.mark.parametrize("name", WEIGHTS)
def test_wrong_weights_are_named(name: str, built: Path, plain: Plain, tmp_path: Path) -> None:
    damage, _, said = DAMAGES[name]
    folder = shutil.copytree(built, tmp_path / "onnx")
    damage(folder)
    source, config = ModelFolder(plain.model), complete_config(plain.model)
    artifact = open_onnx(Graph(folder), config, set(source.names()))
    causes = [finding.cause for finding in compared(artifact, source, {"q_proj": 4, "k_proj": 2}) if finding.cause]
    assert any(said in cause for cause in causes), causes


@pytest.mark.parametrize("built", ["int4"], indirect=True)
@pytest.mark.parametrize("name", WHOLE)
def test_a_damaged_folder_is_named(name: str, built: Path, plain: Plain, tmp_path: Path) -> None:
    damage, part, said = DAMAGES[name]
    folder = shutil.copytree(built, tmp_path / "onnx")
    damage(folder)
    found = of(plain, folder, tmp_path / "report")
    broken = [each for each in found.parts if each.state == "broken"]
    assert [each.id for each in broken] == [part], found.sentence
    assert any(said in text for text in (broken[0].sentence, *broken[0].findings)), broken[0]
    if part == "graph":
        assert "gives the runtime's logits" in broken[0].proof


@pytest.mark.parametrize("built", ["int4"], indirect=True)
def test_a_folder_is_looked_at_in_every_runtime_that_is_named(built: Path, plain: Plain, tmp_path: Path) -> None:
    both = VerifySettings(threads=1, runtimes=("onnxruntime", "onnxruntime-genai"))
    found = diagnose(plain.model, tmp_path / "report", both, onnx=built)
    assert found.exit_code == ExitCode.OK, found.sentence
    assert [part.runtime for part in found.parts if part.id == "kernels"] == ["onnxruntime", "onnxruntime-genai"]
    assert {"as shipped in onnxruntime", "as shipped in onnxruntime-genai"} < found.figures.keys()
    assert [part.id for part in found.parts].count("weights") == 1


def test_a_runtime_that_cannot_run_the_file_is_refused(plain: Plain, built: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"llama\.cpp is requested but there is no gguf"):
        diagnose(plain.model, tmp_path / "report", VerifySettings(runtimes=("llama.cpp",)), onnx=built)
    folder = shutil.copytree(built, tmp_path / "onnx")
    (folder / "genai_config.json").unlink()
    with pytest.raises(InputError, match=r"the folder has no genai_config\.json"):
        diagnose(plain.model, tmp_path / "report", VerifySettings(runtimes=("onnxruntime-genai",)), onnx=folder)


@pytest.mark.parametrize("built", ["fp32"], indirect=True)
@pytest.mark.parametrize("name", ["epsilon", "rotary tables", "sampling", "max_length"])
def test_settings_that_differ_are_read(name: str, built: Path, plain: Plain, tmp_path: Path) -> None:
    damage, _, said = DAMAGES[name]
    config, source = complete_config(plain.model), set(ModelFolder(plain.model).names())
    frequencies = 500000.0 ** (-np.arange(0, 64, 2) / 64)

    def settings(folder: Path) -> list[str]:
        side = OnnxSide(folder, config, source)
        return [difference.said for difference in side.differences(config, frequencies)] + side.sampling({})

    assert settings(built) == []
    folder = shutil.copytree(built, tmp_path / "onnx")
    damage(folder)
    found = settings(folder)
    assert len(found) in (1, 2)
    assert said in found[0]


def rename_logits(folder: Path, name: str) -> None:
    """As a quantizer leaves it that replaces the last product by one with an output of its own."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for value in (value for value in model.graph.output if value.name == "logits"):
        value.name = name
    for node in model.graph.node:
        node.output[:] = [name if output == "logits" else output for output in node.output]
    onnx.save(model, folder / "model.onnx")


@pytest.mark.parametrize("built", ["int4"], indirect=True)
@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime-genai"])
def test_logits_under_another_name_are_named_and_the_rest_is_looked_at(
    runtime: str, built: Path, plain: Plain, tmp_path: Path
) -> None:
    folder = shutil.copytree(built, tmp_path / "onnx")
    rename_logits(folder, "logits_Q4")
    settings = VerifySettings(threads=1, runtimes=(runtime,))
    found = diagnose(plain.model, tmp_path / "report", settings, onnx=folder)
    assert [part.id for part in found.parts if part.state != "ok"] == ["graph"]
    assert "the output that holds the logits is named 'logits_Q4'" in found.sentence
    (graph,) = (part for part in found.parts if part.id == "graph")
    assert "in a copy that has this name: its own numbers" in graph.proof


@pytest.mark.parametrize("built", ["int4"], indirect=True)
def test_a_name_that_genais_config_gives_the_logits_is_theirs(built: Path, plain: Plain, tmp_path: Path) -> None:
    folder = shutil.copytree(built, tmp_path / "onnx")
    rename_logits(folder, "scores")
    config, source = complete_config(plain.model), set(ModelFolder(plain.model).names())
    _json("genai_config.json", lambda table: table["model"]["decoder"]["outputs"].update(logits="scores"))(folder)
    assert OnnxSide(folder, config, source).mended(tmp_path) == ""
    (folder / "genai_config.json").unlink()
    side = OnnxSide(folder, config, source)
    assert "'scores'" in side.mended(tmp_path)
    assert side.cannot_run() == ""


@pytest.mark.parametrize("built", ["int4"], indirect=True)
def test_a_graph_alone_is_judged_by_its_numbers(built: Path, plain: Plain, tmp_path: Path) -> None:
    """Without tokenizer files and configs: the text is what cannot be looked at, and the sentence says what to do."""
    folder = tmp_path / "onnx"
    folder.mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(built / name, folder)
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    for value in graph.graph.input:
        if value.name.startswith("past"):
            value.type.tensor_type.shape.dim[3].dim_value = 64  # GenAI's builder leaves it to genai_config.json
    onnx.save(graph, folder / "model.onnx")
    found = of(plain, folder, tmp_path / "report")
    assert found.exit_code == ExitCode.RUNTIME_UNAVAILABLE
    assert [part.id for part in found.parts if part.state == "ok"] == ["weights", "graph", "kernels"]
    assert "copy the model's tokenizer files beside the graph" in found.sentence


@pytest.mark.parametrize("built", ["int4"], indirect=True)
def test_a_graph_without_a_cache_is_told_as_that(built: Path, plain: Plain, tmp_path: Path) -> None:
    folder = shutil.copytree(built, tmp_path / "onnx")
    (folder / "genai_config.json").unlink()
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    kept = [value for value in graph.graph.input if not value.name.startswith("past")]
    del graph.graph.input[:]
    graph.graph.input.extend(kept)
    onnx.save(graph, folder / "model.onnx")
    found = of(plain, folder, tmp_path / "report")
    assert found.sentence.startswith("The graph and metadata are broken: the graph has no KV cache")
    assert [part.id for part in found.parts if part.state == "not run"] == ["kernels"]
