"""The memory estimate against what a model really holds and saves."""

from pathlib import Path

import pytest
import torch

from qalora_export.errors import InputError
from qalora_export.models.loading import load_model
from qalora_export.qalora.attach import attach, quantized_linears
from qalora_export.qalora.training.memory import check_fits, estimate_memory
from qalora_export.recipe import TrainSettings
from tests.qalora.adapters import adapter_parameters

SETTINGS = TrainSettings(batch_size=4, sequence_length=64, rank=8)


@pytest.mark.parametrize("scales", [False, True])
def test_weights_and_adapter_are_exact(scales: bool, tiny_canonical: Path) -> None:
    settings = SETTINGS.model_copy(update={"scales": scales})
    estimate = estimate_memory(tiny_canonical, settings, dtype=torch.float32, cuda=False)
    model = load_model(tiny_canonical)
    names = attach(model, settings)
    linears = quantized_linears(model).values()
    middles = [tensor for m in linears if m.scales is not None for tensor in (m.scales.centre, m.scales.spread)]
    assert bool(middles) == scales
    assert estimate.packed_weights == sum(tensor.nbytes for m in linears for tensor in m.packed) + sum(
        tensor.nbytes for tensor in middles
    )
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    assert estimate.packed_weights + estimate.other_weights == frozen
    assert estimate.adapter == sum(p.nbytes for p in adapter_parameters(model))
    assert estimate.trainable_parameters * 4 == estimate.adapter
    assert estimate.adapted_modules == len(names)
    assert estimate.optimizer == 2 * estimate.adapter
    assert estimate.total == sum(size for _, size in estimate.rows())


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_saves(
    tiny_canonical: Path, dtype: torch.dtype, checkpointing: bool, scales: bool
) -> None:
    model, settings = load_model(tiny_canonical, dtype=dtype), SETTINGS.model_copy(update={"scales": scales})
    attach(model, settings)
    constant = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in constant:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no address is used twice
        return tensor

    ids = torch.randint(6, 300, (SETTINGS.batch_size, SETTINGS.sequence_length))
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # logits are counted on their own
    assert hidden.requires_grad
    estimates = {
        flag: estimate_memory(
            tiny_canonical, settings.model_copy(update={"gradient_checkpointing": flag}), dtype=dtype, cuda=False
        ).activations
        for flag in (False, True)
    }
    expected = estimates[False]
    if checkpointing:  # the estimate adds one layer in full, for backward; the last norm saves its input now
        expected = estimates[True] - estimates[False] // 2 + ids.numel() * 4 * model.config.hidden_size
    assert sum(saved.values()) == pytest.approx(expected, rel=0.02)


def test_a_gpu_that_is_too_small_is_refused_early(tiny_canonical: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = estimate_memory(tiny_canonical, SETTINGS, dtype=torch.bfloat16, cuda=True)
    assert estimate.overhead > 0
    check_fits(estimate)  # no GPU here: nothing to check
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Small GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (estimate.total, 2**40))
    check_fits(estimate)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (estimate.total - 1, 2**40))
    with pytest.raises(InputError, match="training needs about") as error:
        check_fits(estimate)
    assert "gradient-checkpointing" in error.value.fix and "packed weights" in error.value.why


def test_fsdp_divides_what_is_held_and_gathers_two_layers(tiny_canonical: Path) -> None:
    alone, shared = (
        estimate_memory(tiny_canonical, SETTINGS, dtype=torch.float32, cuda=False, shards=n) for n in (1, 4)
    )
    divided = ("packed_weights", "other_weights", "adapter", "gradients", "optimizer")
    assert [4 * getattr(shared, name) for name in divided] == [getattr(alone, name) for name in divided]
    assert (alone.activations, alone.logits, alone.workspace) == (shared.activations, shared.logits, shared.workspace)
    # the tiny model has two layers, so all of its packed weights are whole at one time
    assert (alone.gathered, shared.gathered) == (0, alone.other_weights + alone.packed_weights + alone.adapter)
