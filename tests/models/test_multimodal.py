"""The language model of a multimodal checkpoint: its numbers, its function on text, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import qalora_export as q
from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.checkpoint.weight_files import SINGLE
from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.formats.contents import FolderContents, compare
from qalora_export.models.loading import load_model
from qalora_export.models.multimodal import TextPart, wrapped_family
from qalora_export.quantization.check import open_forecast
from qalora_export.safety import read_json
from qalora_export.verify.reference.ancestry import ancestry
from qalora_export.verify.reference.layerwise import LayerwiseModel
from qalora_export.verify.reference.merge_check import MergeCheck
from tests.models.families.small import SIZES, WINDOWS
from tests.models.families.tokenizers import save_tokenizer

VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
OWN: Mapping[str, Mapping[str, Any]] = {
    "gemma3": {
        "text_config": {**SIZES, **WINDOWS, "num_hidden_layers": 6},
        "vision_config": {**VISION, "image_size": 28, "patch_size": 14},
    },
    "mistral3": {
        "text_config": {**SIZES, "model_type": "mistral", "head_dim": 32, "sliding_window": None},
        "vision_config": {**VISION, "image_size": 28, "patch_size": 14, "head_dim": 16},
    },
}
RTN = q.QuantizeSettings(method="rtn")


def make(folder: Path, kind: str) -> Any:
    """A random multimodal model, saved as Transformers does, with a tokenizer."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    tokens = save_tokenizer("Gemma", folder)
    text = {**OWN[kind]["text_config"], "vocab_size": tokens["vocab_size"]}
    config = AutoConfig.for_model(kind, **{**OWN[kind], "text_config": text}, eos_token_id=[tokens["eos_token_id"]])
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=sorted(OWN))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("multimodal") / "whole"
    return folder, make(folder, request.param)


def respelled(whole: Path, target: Path, old: str, new: str) -> Path:
    """The same checkpoint with the names of the other version of Transformers."""
    target.mkdir()
    for path in whole.iterdir():
        if path.name != SINGLE:
            (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(whole / SINGLE)
    save_file({name.replace(old, new, 1): tensor for name, tensor in tensors.items()}, target / SINGLE)
    return target


def part_of(folder: Path, scratch: Path) -> TextPart:
    scratch.mkdir()
    whole = ModelFolder(folder)
    family = wrapped_family(whole)
    assert family is not None
    return TextPart(whole, family, scratch)


def test_every_number_of_the_language_model_is_taken_and_nothing_else(made: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = made
    part = part_of(folder, tmp_path / "part")
    state = {f"model.{name}": value for name, value in model.model.language_model.state_dict().items()}
    assert {name for name in part.names() if name != "lm_head.weight"} == set(state)
    for name in state:
        assert np.array_equal(part.tensor(name), state[name].numpy()), name
    taken, every = len(part.names()), len(ModelFolder(folder).names())
    assert sum(part.left_out.values()) == every - taken > 0
    assert part.config["eos_token_id"] == read_json(folder / "config.json")["eos_token_id"]
    (note,) = part.notes()
    assert all(name in note for name in ("vision_tower", "multi_modal_projector", "left out"))


def test_on_text_it_computes_what_the_whole_model_does(made: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = made
    ids = torch.arange(3, 90)[None]
    with torch.inference_mode():
        whole = model(input_ids=ids).logits
        found = LayerwiseModel(folder).run([ids[0].numpy().astype(np.int32)], decode=False)[0]
    np.testing.assert_allclose(found, torch.log_softmax(whole[0], -1).numpy(), atol=2e-5)


def test_the_canonical_checkpoint_is_that_of_the_language_model(made: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = made
    report = q.quantize(folder, tmp_path / "whole.qalora", RTN)
    assert any("left out: " in note for note in report.notes)
    part = part_of(folder, tmp_path / "part")
    save_file({name: np.array(part.tensor(name)) for name in part.names()}, part.path / SINGLE)
    q.quantize(part.path, tmp_path / "text.qalora", RTN)
    ours, theirs = (CanonicalCheckpoint(tmp_path / f"{name}.qalora") for name in ("whole", "text"))
    assert ours.config == theirs.config
    assert ours.config["architectures"][0].endswith("ForCausalLM")
    found = compare(FolderContents(ours), FolderContents(theirs))
    assert found.equal
    assert found.values > 0
    load_model(tmp_path / "whole.qalora")
    kept = ancestry(tmp_path / "whole.qalora", MergeCheck(), original=folder)
    assert (kept.changed, len(kept.compared)) == ((), 1)


def test_both_spellings_of_names_are_read(made: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = made
    names = ModelFolder(folder).names()
    spellings = ("language_model.model.", "model.language_model.")
    old = next(prefix for prefix in spellings if any(name.startswith(prefix) for name in names))
    (new,) = set(spellings) - {old}
    other = respelled(folder, tmp_path / "other", old, new)
    first, second = part_of(folder, tmp_path / "first"), part_of(other, tmp_path / "second")
    assert sorted(first.names()) == sorted(second.names())
    assert first.config == second.config


def test_the_plan_says_what_is_left_out(made: tuple[Path, Any], tmp_path: Path) -> None:
    with open_forecast(made[0], RTN, tmp_path) as forecast:
        assert any("only the language model is taken" in note for note in forecast.notes)


def test_a_checkpoint_with_two_tensors_of_one_name_or_packed_ones_is_refused(
    made: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, _ = made
    twice = respelled(folder, tmp_path / "twice", "", "")
    tensors = load_file(twice / SINGLE)
    norm = next(value for name, value in tensors.items() if name.endswith("norm.weight"))
    both = {"language_model.model.norm.weight": norm, "model.language_model.norm.weight": norm}
    save_file(tensors | both, twice / SINGLE)
    with pytest.raises(UnsafeInputError, match="same one"):
        part_of(twice, tmp_path / "a")
    packed = respelled(folder, tmp_path / "packed", "", "")
    config = read_json(packed / "config.json") | {"quantization_config": {"quant_method": "gptq"}}
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="quantized already"):
        part_of(packed, tmp_path / "b")
