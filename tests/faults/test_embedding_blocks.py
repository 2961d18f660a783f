"""Faults in an embedding of blocks that is lm_head too: the graph reads it twice, either can be wrong alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from qalora_export.checkpoint.manifest import MANIFEST
from qalora_export.errors import ExitCode
from qalora_export.formats.onnx.export import export_onnx
from qalora_export.formats.onnx.layout import GRAPH
from qalora_export.quantization.rules import parse_rule
from qalora_export.quantization.stage import quantize
from qalora_export.recipe import OnnxSettings, QuantizeSettings, VerifySettings
from qalora_export.safety import sha256_file
from qalora_export.verify.stage import verify_parity
from tests.conftest import MadeOnce
from tests.models import make_tiny_model

EMBEDDING = "model.embed_tokens"


def make_line(folder: Path) -> None:
    make_tiny_model(folder / "model", num_hidden_layers=1, hidden_size=256, tie_word_embeddings=True)
    rules = (parse_rule(f"{EMBEDDING}=grid:q8_0"),)
    quantize(folder / "model", folder / "base", QuantizeSettings(method="rtn", rules=rules))
    export_onnx(folder / "base", folder / "onnx", OnnxSettings())


def other_scales(folder: Path, reader: str) -> None:
    """1 % larger, in a tensor of their own, for the one node that is named."""
    model = onnx.load(folder / GRAPH, load_external_data=False)
    (node,) = [node for node in model.graph.node if node.name == reader]
    (scale,) = [tensor for tensor in onnx.load(folder / GRAPH).graph.initializer if tensor.name == node.input[0]]
    values = onnx.numpy_helper.to_array(scale)
    larger = (values.astype(np.float64) * 1.01).astype(values.dtype)
    node.input[0] = "other.scale"
    model.graph.initializer.append(onnx.numpy_helper.from_array(larger, "other.scale"))
    onnx.save(model, folder / GRAPH)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][GRAPH] |= {"bytes": (folder / GRAPH).stat().st_size, "sha256": sha256_file(folder / GRAPH)}
    (folder / MANIFEST).write_text(json.dumps(manifest))


PLANTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "nothing": (lambda _: None, ""),
    "the embedding reads other scales": (lambda folder: other_scales(folder, f"{EMBEDDING}/scale/Cast"), "G2"),
    "lm_head reads other scales": (lambda folder: other_scales(folder, "lm_head/scale/Cast"), "G2 G3"),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_fault_in_one_reading_is_red(plant: str, made_once: MadeOnce, tmp_path: Path) -> None:
    line = made_once("embedding blocks", make_line)
    folder = Path(shutil.copytree(line / "onnx", tmp_path / "onnx"))
    damage, red = PLANTS[plant]
    damage(folder)
    settings = VerifySettings(runtimes=("onnxruntime",), threads=1, sequences=16).model_copy(update={"positions": 1})
    report = verify_parity(line / "base", tmp_path / "report", settings, onnx=folder, bisect=False)
    failed = {entry.gate for entry in report.entries if entry.status == "fail"}
    assert failed >= set(red.split()), report.entries
    assert (report.exit_code == ExitCode.OK) == (not red), report.entries
