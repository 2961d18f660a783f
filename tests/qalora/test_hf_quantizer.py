"""from_pretrained, save_pretrained and load_model on canonical checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.errors import InputError, QaloraError
from qalora_export.grid import differing, pack_codes
from qalora_export.models.loading import load_model, load_tokenizer
from qalora_export.qalora.attach import quantized_linears
from tests.models import make_tiny_canonical, make_tiny_model

IDS = torch.from_numpy(np.random.default_rng(0).integers(0, 300, (2, 16)))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loads_the_checkpoint_bytes_in_any_compute_dtype(tiny_canonical: Path, dtype: torch.dtype) -> None:
    model, checkpoint = load_model(tiny_canonical, dtype=dtype), CanonicalCheckpoint(tiny_canonical)
    layers = quantized_linears(model)
    assert set(layers) == set(checkpoint.modules)
    for name, layer in layers.items():
        matrix = checkpoint.group_affine(name)
        assert differing(layer.codes.numpy(), pack_codes(matrix.codes, 4)) == 0
        assert differing(layer.scale.numpy(), matrix.scale) == 0
        assert differing(layer.offset.numpy(), matrix.offset) == 0
        assert not any(tensor.requires_grad for tensor in layer.packed)
    assert model.lm_head.weight.dtype == dtype
    assert logits(model).isfinite().all()


def test_computes_what_a_plain_model_with_the_dequantized_weights_computes(
    tiny_model: Path, tiny_canonical: Path, tmp_path: Path
) -> None:
    checkpoint = CanonicalCheckpoint(tiny_canonical)
    shutil.copytree(tiny_model, tmp_path / "plain")
    tensors = {name: np.asarray(t, np.float32) for name, t in checkpoint.tensors() if name in checkpoint.plain_names()}
    tensors |= {f"{name}.weight": checkpoint.group_affine(name).dequantize() for name in checkpoint.modules}
    save_file(tensors, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(load_model(tmp_path / "plain")), logits(load_model(tiny_canonical)))


@pytest.mark.parametrize("overrides", [{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_tied_embeddings_and_biases(tmp_path: Path, overrides: dict[str, bool]) -> None:
    source = make_tiny_model(tmp_path / "model", **overrides)
    model = load_model(make_tiny_canonical(tmp_path / "base", source, bits=8))
    reference = load_model(source)
    assert (logits(model) - logits(reference)).square().mean() < 1e-3 * logits(reference).square().mean()


def test_save_pretrained_round_trip(tiny_canonical: Path, tmp_path: Path) -> None:
    model = load_model(tiny_canonical)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))
    assert CanonicalCheckpoint(tmp_path / "saved").modules == CanonicalCheckpoint(tiny_canonical).modules


def test_tokenizer_loads_from_the_checkpoint(tiny_canonical: Path, tiny_model: Path) -> None:
    text = "Turn on the lights — naïve 東京 🙂"
    assert load_tokenizer(tiny_canonical)(text).input_ids == load_tokenizer(tiny_model)(text).input_ids


def edited(source: Path, target: Path, change: object) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


BAD_MODULES = {
    "no bits": {"group_size": 32},
    "bits 7": {"bits": 7, "group_size": 32},
    "no table": 4,
    "group 48": {"bits": 4, "group_size": 48},
}


@pytest.mark.parametrize("case", BAD_MODULES)
def test_malformed_module_entries_are_refused_on_every_way_in(tiny_canonical: Path, tmp_path: Path, case: str) -> None:
    module = "model.layers.0.self_attn.q_proj"

    def change(config: dict) -> None:
        config["quantization_config"]["modules"][module] = BAD_MODULES[case]

    folder = edited(tiny_canonical, tmp_path / "bad", change)
    with pytest.raises(QaloraError):
        load_model(folder)
    with pytest.raises(InputError, match=module):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(("module", "reason"), [("model.ghost", "does not have"), ("model.norm", "cannot quantize")])
def test_modules_the_model_has_not_are_refused(tiny_canonical: Path, tmp_path: Path, module: str, reason: str) -> None:
    def change(config: dict) -> None:
        config["quantization_config"]["modules"][module] = {"bits": 4, "group_size": 32}

    with pytest.raises(InputError, match=reason):
        AutoModelForCausalLM.from_pretrained(edited(tiny_canonical, tmp_path / "bad", change))


def test_absent_tensors_are_an_error_and_not_random_numbers(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 tensors.*model\.norm\.weight"):
        load_model(tmp_path / "m")


def test_wrong_shapes_are_one_clear_error(tiny_model: Path, tmp_path: Path) -> None:
    def change(config: dict) -> None:
        config["hidden_size"] = 64

    with pytest.raises(InputError, match="Transformers cannot load the model"):
        load_model(edited(tiny_model, tmp_path / "m", change))


def test_custom_code_is_never_run(tiny_model: Path, tmp_path: Path) -> None:
    def change(config: dict) -> None:
        config |= {
            "model_type": "evil",
            "auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"},
        }

    folder = edited(tiny_model, tmp_path / "m", change)
    (folder / "evil.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()")
    with pytest.raises(InputError):
        load_model(folder)
    assert not (tmp_path / "ran").exists()
