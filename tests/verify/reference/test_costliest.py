"""The layers that int8 activations cost most in are those that cost it, found by trying."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qalora_export.models.loading import load_tokenizer
from qalora_export.recipe import VerifySettings
from qalora_export.verify.metrics import following_ids, position_metrics
from qalora_export.verify.probes.probe_set import ProbeSet, make_probes
from qalora_export.verify.reference.costliest import costliest
from qalora_export.verify.reference.logits import reference_logprobs, simulated_int8_logprobs
from tests.models import make_tiny_canonical, make_tiny_model

DEAR = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One feature of down_proj's input is 300 times the others, and down_proj hardly looks at it."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("dear")
    make_tiny_model(folder / "model", num_hidden_layers=3)
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        mlp.up_proj.weight[40:43] *= 300
        mlp.down_proj.weight[:, 40:43] /= 300
    model.save_pretrained(folder / "model")
    return make_tiny_canonical(folder / "base.qalora", folder / "model", bits=8)


@pytest.fixture(scope="module")
def probes(checkpoint: Path) -> ProbeSet:
    config = {"vocab_size": 360, "max_position_embeddings": 256}
    return make_probes(load_tokenizer(checkpoint), config, VerifySettings()).some([2, 6, 8])


def test_the_dear_layer_is_named_and_without_it_the_cost_is_gone(checkpoint: Path, probes: ProbeSet) -> None:
    exact = reference_logprobs(checkpoint, probes, threads=1).logprobs
    int8 = simulated_int8_logprobs(checkpoint, probes, threads=1)
    measured = position_metrics(exact, int8, following_ids(probes.ids, probes.lengths))
    found = costliest(checkpoint, probes, measured.kl, threads=1)
    assert found.modules[0][0] == DEAR
    assert found.modules[0][1] > 3 * found.modules[1][1]
    index = probes.names.index(found.sequence)
    rows = slice(probes.starts[index], probes.starts[index] + probes.lengths[index])
    assert measured.kl[rows].sum() == pytest.approx(max(np.add.reduceat(measured.kl, probes.starts)))
    assert found.together == pytest.approx(measured.kl[rows].mean(), rel=1e-3)
    assert found.without < found.together / 3
    assert DEAR in found.describe() and found.sequence in found.describe()
