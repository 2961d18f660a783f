"""One layer at a time gives the bits of the whole model, and holds no more than one layer."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from qalora_export.errors import InputError
from qalora_export.verify.reference import layerwise
from qalora_export.verify.reference.layerwise import LayerwiseModel
from qalora_export.verify.reference.logits import fixed_threads, float32_model, round_to_int8, ulps
from tests.models import make_tiny_canonical, make_tiny_model
from tests.models.families.small import make_small

SEQUENCES = [np.random.default_rng(length).integers(6, 300, length).astype(np.int32) for length in (1, 7, 33)]


def whole(model: object, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """The oracle: one forward pass of the whole model over the prompt."""
    logits = model(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), dim=-1).numpy()


def walked(model: object, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """The oracle of decode: token by token, each step seeing the earlier ones through the KV cache only."""
    cache, rows = None, []
    for token in ids.tolist():
        answer = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        cache = answer.past_key_values
        rows.append(torch.log_softmax(answer.logits[0, -1].float(), dim=-1).numpy())
    return np.stack(rows)


@pytest.mark.parametrize(
    "overrides",
    [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 3}],
    ids=["plain", "tied", "biases, three layers"],
)
def test_the_same_bits_as_the_whole_model(tmp_path: Path, overrides: dict[str, object]) -> None:
    base = make_tiny_canonical(tmp_path / "base", make_tiny_model(tmp_path / "model", **overrides))
    with fixed_threads(1), torch.inference_mode():
        prefill, decoded = LayerwiseModel(base).run(SEQUENCES, decode=True)
        model = float32_model(base)
        np.testing.assert_array_equal(prefill, np.concatenate([whole(model, ids) for ids in SEQUENCES]))
        np.testing.assert_array_equal(decoded, np.concatenate([walked(model, ids) for ids in SEQUENCES]))


def test_rounding_reaches_every_quantized_layer(tiny_canonical: Path) -> None:
    with fixed_threads(1), torch.inference_mode():
        found = LayerwiseModel(tiny_canonical, rounding=round_to_int8).run(SEQUENCES, decode=False)[0]
        model = float32_model(tiny_canonical)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
                module.register_forward_pre_hook(lambda _, x: (round_to_int8(x[0], 32),))
        np.testing.assert_array_equal(found, np.concatenate([whole(model, ids) for ids in SEQUENCES]))


@pytest.mark.parametrize("family", ["Gemma 3", "Phi-4-mini"])
def test_copies_are_the_same_prompts_again_and_again(family: str, tmp_path: Path) -> None:
    """Windows and two rotary tables reach all copies; a noise of nothing leaves them alone."""
    folder, prompts = make_small(tmp_path / "model", family), [*SEQUENCES, np.tile(SEQUENCES[2], 3)]
    seen = []
    with fixed_threads(1), torch.inference_mode():
        (once,) = LayerwiseModel(folder).run(prompts, decode=False)
        copies = list(LayerwiseModel(folder, noise=lambda x: seen.append(x.shape[0]) or x).copies(prompts, 3))
    assert set(seen) == {3, 1}  # the head answers one at a time
    for at, rows in enumerate(np.split(once, np.cumsum([len(ids) for ids in prompts])[:-1])):
        for copy in copies[3 * at : 3 * at + 3]:
            np.testing.assert_allclose(copy, rows, atol=1e-4)


@pytest.mark.parametrize("at_once", [1024, 17, 1], ids=["one batch", "several", "one by one"])
def test_copies_are_runs_of_their_own(tiny_canonical: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Each row of a batch has its own noise and its own attention; alone it answers the same but for float32."""
    monkeypatch.setattr(layerwise, "AT_ONCE", at_once)
    kept = [np.array([0, len(ids) - 1]) for ids in SEQUENCES]
    with fixed_threads(1), torch.inference_mode():
        (quiet,) = LayerwiseModel(tiny_canonical).run(SEQUENCES, decode=False, kept=kept)
        draws = list(LayerwiseModel(tiny_canonical, noise=ulps(1)).copies(SEQUENCES, 3, kept=kept))
    assert len({draw.tobytes() for draw in draws}) == 9
    for number, one in enumerate(np.split(quiet, len(SEQUENCES))):
        np.testing.assert_allclose(draws[3 * number : 3 * number + 3], [one] * 3, atol=1e-3)


def test_one_layer_is_held_at_a_time(tiny_canonical: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[set[str]] = []

    def watch(module: torch.nn.Module, *_: object) -> None:
        held.append({name for name, parameter in model._skeleton.model.named_parameters() if not parameter.is_meta})

    model = LayerwiseModel(tiny_canonical)
    for layer in model._skeleton.base.layers:
        layer.register_forward_hook(watch)
    with torch.inference_mode():
        model.run(SEQUENCES[1:2], decode=True)
    assert len(held) == 2 * (1 + 7)
    for names in held:
        assert len({name.split(".")[2] for name in names}) == 1 and all(".layers." in name for name in names)
    assert all(parameter.is_meta for parameter in model._skeleton.model.parameters())


def test_a_tensor_of_another_shape_is_refused(tiny_canonical: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_canonical, broken)
    file = broken / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"][:-1].copy()}, file)
    with pytest.raises(InputError, match="shape"):
        LayerwiseModel(broken)
