"""Batches: samples padded on the right, or several samples packed into one row without seeing each other.

No attention mask is passed in either case. Padding stands on the right, so under causal attention no real token sees
it. Packed rows are told apart by position_ids that start again at 0 with each sample: Transformers 5 reads the sample
boundaries off them and blocks attention across (masking_utils.find_packed_sequence_indices). It only does so without a
KV cache, so the model must run with config.use_cache = False, as the train stage sets it.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from qalora_export.data.samples import IGNORED, Sample

if TYPE_CHECKING:
    from torch import Tensor

Row = tuple[Sample, ...]  # one row of a batch: a single sample, or packed ones


def one_per_row(samples: Iterable[Sample]) -> list[Row]:
    return [(sample,) for sample in samples]


def pack(samples: Sequence[Sample], length: int) -> list[Row]:
    """Best fit decreasing: longest sample first, each into the fullest row it still fits in.

    Deterministic; every sample appears once and whole. No sample may be longer than `length`.
    """
    rows: list[list[Sample]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for sample in sorted(samples, key=len, reverse=True):
        slot = bisect.bisect_left(room, (len(sample), -1))
        free, row = room.pop(slot) if slot < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(sample)
        bisect.insort(room, (free - len(sample), row))
    return [tuple(row) for row in rows]


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """input_ids, labels and position_ids, int64 (rows, longest row). Padding is a segment of its own, never learned."""
    import torch

    width = max(sum(len(sample) for sample in row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)  # any id will do: no real token sees the padding
    labels = torch.full((len(rows), width), IGNORED, dtype=torch.long)
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        begin = 0
        for sample in row:
            end = begin + len(sample)
            ids[index, begin:end] = torch.tensor(sample.ids)
            labels[index, begin:end] = torch.tensor(sample.labels)
            positions[index, begin:end] = torch.arange(len(sample))
            begin = end
        positions[index, begin:] = torch.arange(width - begin)
    if all(len(row) == 1 for row in rows):
        # The model's own 0, 1, 2, … : right for every real token, and SDPA keeps its fast path without a mask.
        return {"input_ids": ids, "labels": labels}
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def tokens(rows: Iterable[Row]) -> int:
    """Tokens that are not padding."""
    return sum(len(sample) for row in rows for sample in row)
