"""Packed rows give every sample the numbers it has alone."""

from array import array
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qalora_export.data.samples import IGNORED, Sample
from qalora_export.data.sequence_packing import collate, one_per_row, pack, tokens
from qalora_export.models.loading import load_model


def make(rng: np.random.Generator, length: int) -> Sample:
    ids = array("i", rng.integers(6, 360, length).tolist())
    return Sample(ids, array("i", [IGNORED, *(i if rng.random() < 0.6 else IGNORED for i in ids[1:])]), line=0)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=60))
def test_every_sample_once_and_whole(lengths: list[int]) -> None:
    samples = [Sample(array("i", [n] * n), array("i", [IGNORED] * n), line) for line, n in enumerate(lengths)]
    rows = pack(samples, 64)
    assert sorted(s.line for row in rows for s in row) == list(range(len(lengths)))
    assert all(sum(map(len, row)) <= 64 for row in rows)
    assert tokens(rows) == sum(lengths)
    # Two rows that fit into one were never left apart: best fit would have joined them.
    fills = sorted(sum(map(len, row)) for row in rows)
    assert len(fills) < 2 or fills[0] + fills[1] > 64


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_logits_and_loss_equal_unpacked(tiny_canonical: Path, attention: str) -> None:
    rng = np.random.default_rng(0)
    samples = [make(rng, n) for n in (9, 21, 14, 30, 5, 17, 3)]
    model = load_model(tiny_canonical, attention=attention)
    model.config.use_cache = False
    packed, single = pack(samples, 48), one_per_row(samples)
    assert len(packed) < len(samples)
    with torch.no_grad():
        batch = collate(packed)
        together = model(**batch).logits
        losses = [model(**collate(rows)).loss for rows in (packed, single)]
        for index, row in enumerate(packed):
            begin = 0
            for sample in row:
                alone = model(input_ids=torch.tensor([sample.ids])).logits[0]
                part = together[index, begin : begin + len(sample)]
                torch.testing.assert_close(part, alone, rtol=1e-4, atol=1e-4)
                begin += len(sample)
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
        # The test can tell: without the positions the samples see each other.
        leaking = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    assert abs(float(leaking - losses[1])) > 1e-3


def test_padding_changes_nothing(tiny_canonical: Path) -> None:
    rng = np.random.default_rng(1)
    samples = [make(rng, n) for n in (4, 40, 11)]
    model = load_model(tiny_canonical)
    with torch.no_grad():
        logits = model(**collate(one_per_row(samples))).logits
        for index, sample in enumerate(samples):
            alone = model(input_ids=torch.tensor([sample.ids])).logits[0]
            torch.testing.assert_close(logits[index, : len(sample)], alone, rtol=1e-4, atol=1e-4)
