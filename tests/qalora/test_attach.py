"""Who gets an adapter, and from which random numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qalora_export.errors import InputError
from qalora_export.models.loading import load_model
from qalora_export.qalora.attach import attach, quantized_linears
from qalora_export.recipe import TrainSettings
from tests.qalora.adapters import adapter_parameters


def settings(**changes: object) -> TrainSettings:
    return TrainSettings(**{"rank": 4, "alpha": 8.0} | changes)


def test_only_adapters_train_and_the_model_starts_unchanged(tiny_canonical: Path) -> None:
    model = load_model(tiny_canonical)
    ids = torch.arange(20).view(1, -1)
    before = model(ids).logits
    names = attach(model, settings())
    assert len(names) == 14
    assert all(name.endswith("_proj") for name in names)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(trainable) == 28
    assert {id(p) for p in trainable} == {id(p) for p in adapter_parameters(model)}
    assert {p.dtype for p in trainable} == {torch.float32}
    assert torch.equal(model(ids).logits, before)


def test_adapters_are_float32_over_a_bfloat16_model(tiny_canonical: Path) -> None:
    model = load_model(tiny_canonical, dtype=torch.bfloat16)
    attach(model, settings())
    assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}


def test_targets_are_shell_patterns(tiny_canonical: Path) -> None:
    model = load_model(tiny_canonical)
    assert attach(model, settings(targets=("*.q_proj", "model.layers.1.mlp.*"))) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    ]


def test_attaching_again_replaces(tiny_canonical: Path) -> None:
    model = load_model(tiny_canonical)
    attach(model, settings())
    assert attach(model, settings(targets=("*.0.*.q_proj",))) == ["model.layers.0.self_attn.q_proj"]
    assert sum(layer.lora_A is not None for layer in quantized_linears(model).values()) == 1


def test_init_depends_on_seed_and_name_alone(tiny_canonical: Path) -> None:
    def start(**changes: object) -> dict[str, torch.Tensor]:
        torch.manual_seed(len(changes))
        model = load_model(tiny_canonical)
        return {name: model.get_submodule(name).lora_A.detach() for name in attach(model, settings(**changes))}

    everywhere, queries, other = start(), start(targets=("*.q_proj",)), start(seed=1)
    for name, a in queries.items():
        assert torch.equal(a, everywhere[name])
        assert not torch.equal(a, other[name])
    first, second = queries.values()
    assert not torch.equal(first, second)


def test_a_pattern_that_matches_nothing_lists_what_there_is(tiny_canonical: Path) -> None:
    with pytest.raises(InputError, match=r"'\*\.query'.*\*\.down_proj, .*\*\.v_proj"):
        attach(load_model(tiny_canonical), settings(targets=("*.q_proj", "*.query")))


def test_a_model_that_is_not_quantized_is_refused(tiny_model: Path) -> None:
    with pytest.raises(InputError, match=r"none.*qalora-export quantize"):
        attach(load_model(tiny_model), settings())


def test_a_pool_that_does_not_fit_names_the_module(tiny_canonical: Path) -> None:
    with pytest.raises(InputError, match=r"pool length 48.*layers\.0"):
        attach(load_model(tiny_canonical), settings(pool=48))
    model = load_model(tiny_canonical)
    attach(model, settings(pool=64))
    assert {layer.pool for layer in quantized_linears(model).values()} == {64}
