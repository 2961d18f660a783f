"""Each point by itself: in a model that amplifies float32 rounding the planted place is named, and no other."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from qalora_export.checkpoint.safetensors_file import read_header
from qalora_export.models.families.llama import LLAMA
from qalora_export.verify.bisect.points import layer_points, model_points
from qalora_export.verify.bisect.search import Bisection, bisect
from qalora_export.verify.bisect.values import ReferenceModel, Suspect
from qalora_export.verify.metrics import EXACT
from qalora_export.verify.reference.local_proof import position_nmse
from tests.models import make_tiny_canonical, make_tiny_model

LAYERS = 3
IDS = (np.arange(40, dtype=np.int32) * 17) % 360
SUSPECT = Suspect("G2", "exact", "prefill", "a sequence", IDS)
POINTS = [*model_points(LAYERS), *(p for layer in range(LAYERS) for p in layer_points(layer, LLAMA.points)[:-1])]


def cancel_later(folder: Path) -> None:
    """Adds 3000 to the residual stream in layer 0 and takes it away in layer 1: what lay beside it keeps the rounding
    of numbers of that size.
    """
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder)
    large = 3000.0 * torch.sign(torch.randn(128, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.bias.copy_(large)
        model.model.layers[1].self_attn.o_proj.bias.copy_(-large)
    model.half().save_pretrained(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ill")
    make_tiny_model(folder / "model", num_hidden_layers=LAYERS, attention_bias=True, mlp_bias=True)
    cancel_later(folder / "model")
    return make_tiny_canonical(folder / "base.qalora", folder / "model")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> ReferenceModel:
    return ReferenceModel(checkpoint, threads=1)


def other_library(checkpoint: Path) -> dict[str, np.ndarray]:
    """What a runtime with other roundings has at every point: the same model in float64, where Transformers allows."""
    runtime = ReferenceModel(checkpoint, threads=1)
    runtime._model.double()
    return runtime.activations(IDS, POINTS)


def found_in(shown: dict[str, np.ndarray], model: ReferenceModel) -> Bisection:
    return bisect("r", SUSPECT, model, LAYERS, lambda *_: shown, family=LLAMA, through="test")


def test_a_right_runtime_has_no_wrong_point_although_its_logits_are_beyond_the_unscaled_bound(
    checkpoint: Path, model: ReferenceModel
) -> None:
    shown = other_library(checkpoint)
    assert position_nmse(shown[" output"], model.activations(IDS, POINTS)[" output"]).max() > EXACT
    found = found_in(shown, model)
    assert (found.first, found.note) == (None, "")


def flip(folder: Path, name: str) -> None:
    """One code of a matrix, or one value of another tensor by a tenth."""
    path = folder / "model.safetensors"
    header = read_header(path)
    at = (header.get(f"{name}.codes") or header[f"{name}.weight"]).begin
    with path.open("r+b") as file:
        file.seek(at)
        old = file.read(2)
        new = bytes([old[0] ^ 0x01, old[1]])
        if f"{name}.codes" not in header:
            new = (np.frombuffer(old, np.float16) * np.float16(1.1)).tobytes()
        assert new != old
        file.seek(at)
        file.write(new)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("module", [*LLAMA.linears, *LLAMA.norms])
def test_one_code_of_any_module_is_named_and_nothing_else(
    layer: int, module: str, checkpoint: Path, model: ReferenceModel, tmp_path: Path
) -> None:
    damaged, name = tmp_path / "damaged", f"model.layers.{layer}.{module}"
    shutil.copytree(checkpoint, damaged)
    flip(damaged, name)
    found = found_in(other_library(damaged), model)
    assert found.first is not None
    assert [step.name for step in found.inside if step.diverges] == [name]
    wrong = [step.name for step in found.layers if step.diverges]
    assert wrong == [found.first_layer] == [f"model.layers.{layer}"]


@pytest.mark.parametrize("name", ["model.norm", "lm_head"])
def test_what_lies_behind_the_layers_is_named(
    name: str, checkpoint: Path, model: ReferenceModel, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    flip(damaged, name)
    found = found_in(other_library(damaged), model)
    assert [step.name for step in found.layers if step.diverges] == [name]
    assert found.first is not None and found.first.name == name


def test_a_wrong_embedding_is_named(checkpoint: Path, model: ReferenceModel) -> None:
    shown = other_library(checkpoint)
    shown["model.layers.0 input"] = shown["model.layers.0 input"] * np.float32(1.001)
    found = found_in(shown, model)
    assert found.first is not None and found.first.name == "model.embed_tokens"


def test_a_value_of_another_shape_or_with_nan_is_as_wrong_as_can_be(checkpoint: Path, model: ReferenceModel) -> None:
    name = "model.layers.1.mlp.up_proj"
    for spoil in (lambda value: value[:, :-1], lambda value: np.full_like(value, np.nan)):
        shown = other_library(checkpoint)
        shown[f"{name} output"] = spoil(shown[f"{name} output"])
        found = found_in(shown, model)
        assert found.first is not None
        assert (found.first.name, found.first.nmse) == (name, float("inf"))
