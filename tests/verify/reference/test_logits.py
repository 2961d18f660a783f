"""The reference is the checkpoint: prefill and decode agree, and its weights are compared with numpy's."""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from qalora_export.errors import InputError
from qalora_export.models.loading import load_model, load_tokenizer
from qalora_export.recipe import VerifySettings
from qalora_export.verify.metrics import following_ids, position_metrics
from qalora_export.verify.probes.probe_set import ProbeSet, make_probes
from qalora_export.verify.reference import layerwise
from qalora_export.verify.reference import logits as reference
from qalora_export.verify.reference.layerwise import LayerwiseModel


@pytest.fixture(scope="module")
def probes(tiny_canonical: Path) -> ProbeSet:
    config = json.loads((tiny_canonical / "config.json").read_text())
    whole = make_probes(load_tokenizer(tiny_canonical), config, VerifySettings())
    count = int(whole.lengths[:6].sum())
    return ProbeSet(whole.ids[:count], whole.lengths[:6], whole.names[:6])


def test_equals_a_plain_forward_of_the_loaded_model(tiny_canonical: Path, probes: ProbeSet) -> None:
    found = reference.reference_logprobs(tiny_canonical, probes, threads=1)
    model = load_model(tiny_canonical, attention="eager")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            rows = [
                torch.log_softmax(model(torch.tensor(ids.astype(np.int64))[None]).logits[0], -1)
                for ids in probes.sequences()
            ]
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(found.logprobs, torch.cat(rows).numpy())
    np.testing.assert_array_equal(found.frequencies, model.model.rotary_emb.inv_freq.numpy())


def test_decode_agrees_with_prefill(tiny_canonical: Path, probes: ProbeSet) -> None:
    found = reference.reference_logprobs(tiny_canonical, probes, threads=1, decode=True)
    assert found.decoded is not None
    summary = position_metrics(found.logprobs, found.decoded, following_ids(probes.ids, probes.lengths)).summary()
    assert summary.nmse_max < 1e-10
    assert summary.disagreements == 0


def test_a_torch_that_dequantizes_otherwise_is_refused(
    tiny_canonical: Path, probes: ProbeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = layerwise.dequantize
    monkeypatch.setattr(layerwise, "dequantize", lambda *arguments: right(*arguments) * (1 + 2**-23))
    with pytest.raises(InputError, match="dequantize"):
        reference.reference_logprobs(tiny_canonical, probes, threads=1)


def test_simulated_int8_is_noise_and_not_nothing(tiny_canonical: Path, probes: ProbeSet) -> None:
    exact = reference.reference_logprobs(tiny_canonical, probes, threads=1).logprobs
    noisy = reference.simulated_int8_logprobs(tiny_canonical, probes, threads=1)
    summary = position_metrics(exact, noisy, following_ids(probes.ids, probes.lengths)).summary()
    assert 1e-7 < summary.nmse_mean < 1e-2


def test_int8_rounding_is_that_of_its_definition() -> None:
    x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    x[1, :32] = 0
    found = reference.round_to_int8(torch.from_numpy(x)).numpy()
    for row in range(3):
        for block in range(2):
            values = x[row, 32 * block : 32 * block + 32]
            step = np.float32(np.abs(values).max() / np.float32(127))
            expected = np.rint(values / step) * step if step else values
            np.testing.assert_allclose(found[row, 32 * block : 32 * block + 32], expected, rtol=1e-6)


def test_rounding_noise_is_that_of_float32_and_the_same_again(tiny_canonical: Path, probes: ProbeSet) -> None:
    some = probes.some([1, 4])
    assert some.names == (probes.names[1], probes.names[4])
    exact = reference.reference_logprobs(tiny_canonical, some, threads=1).logprobs
    found = reference.rounding_noise(tiny_canonical, some, exact, threads=1)
    assert found.shape == (int(some.lengths.sum()),) and found.dtype == np.float64
    assert (found > 1e-16).all() and (found < 1e-11).all()
    np.testing.assert_array_equal(found, reference.rounding_noise(tiny_canonical, some, exact, threads=1))


def test_rounding_noise_shows_what_cancels_later(tiny_canonical: Path, probes: ProbeSet) -> None:
    """What one layer adds to the residual stream and the next takes away leaves what it was rounded by."""
    some, ordinary, cancelled = probes.some([4]), [], []
    for size, found in ((0.0, ordinary), (3e3, cancelled)):
        with layers_that_cancel(size), torch.inference_mode():
            exact = LayerwiseModel(tiny_canonical).run(some.sequences(), decode=False)[0]
            found += reference.rounding_noise(tiny_canonical, some, exact, threads=1).tolist()
    assert np.median(cancelled) > 100 * np.median(ordinary)


def test_rounding_noise_is_no_matter_of_luck() -> None:
    """Where one direction is amplified a draw is one number squared, and the mean of four may be far too low."""
    length = 400
    ids = np.zeros(length, np.int32)
    probes = ProbeSet(ids, np.array([length], np.int32), ("one",))
    logits = torch.linspace(-2, 2, 8).expand(length, 8)
    exact = torch.log_softmax(logits, -1)

    class OneDirection:
        def __init__(self, noise: Callable[[torch.Tensor], torch.Tensor]) -> None:
            self.noise = noise

        def copies(self, sequences: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
            for _ in sequences:
                moved = (self.noise(torch.ones(count, length, 1)) - 1) * 1e3
                yield from torch.log_softmax(logits + moved * torch.eye(8)[3], -1).numpy()

    found = reference.noise_of(OneDirection, probes, exact.numpy())
    assert found.max() < 7 * found.min(), "its true value is the same at every position"


@contextlib.contextmanager
def layers_that_cancel(size: float) -> Iterator[None]:
    """Behind the first decoder layer `size` is added to every hidden value, behind the second taken away."""
    run, seen = layerwise._advance, {}

    def shifted(layer: torch.nn.Module, index: int, steps: list, cache: object) -> None:
        seen.setdefault(index, layer.register_forward_hook(lambda _, x, y: _moved(y, size if index == 0 else -size)))
        run(layer, index, steps, cache)
        seen.pop(index).remove()

    with patch.object(layerwise, "_advance", shifted):
        yield


def _moved(output: torch.Tensor | tuple, by: float) -> torch.Tensor | tuple:
    return (output[0] + by, *output[1:]) if isinstance(output, tuple) else output + by
