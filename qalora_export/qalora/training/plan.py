"""What a training run would do, known before the model is loaded: rows, optimizer steps, memory.

`run` and `train --dry-run` ask here; it reads and tokenizes the data and trains nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qalora_export.data.sequence_packing import Row, one_per_row, pack, tokens
from qalora_export.errors import InputError
from qalora_export.qalora.training.processes import check_engine, shards
from qalora_export.recipe import TrainSettings
from qalora_export.safety import StrPath

if TYPE_CHECKING:
    import torch

    from qalora_export.checkpoint.forecast import Forecast
    from qalora_export.data.samples import Account, SampleSet
    from qalora_export.qalora.training.arguments import Steps
    from qalora_export.qalora.training.memory import MemoryEstimate


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """What a run would do, known before the model is loaded."""

    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    steps: Steps
    dtype: torch.dtype
    memory: MemoryEstimate
    accounts: dict[str, Account]  # "data" and, with validation data, "validation"
    untrained: tuple[str, ...] = ()  # modules that no pattern reaches (qalora/targets.py)

    @property
    def samples(self) -> int:
        return sum(len(row) for row in self.train)

    @property
    def tokens(self) -> int:
        return tokens(self.train)


def plan(base: StrPath | Forecast, settings: TrainSettings) -> TrainPlan:
    """Read and tokenize the data, count steps, estimate memory; trains nothing. Raises InputError as the parts do.

    base: a canonical checkpoint, or the forecast of one that quantize has yet to write.
    """
    from qalora_export.checkpoint.canonical import CanonicalCheckpoint
    from qalora_export.checkpoint.forecast import Forecast

    forecast = base if isinstance(base, Forecast) else Forecast.of(CanonicalCheckpoint(Path(base)))
    check_machine(settings)
    return planned(forecast, settings, {name: read_data(forecast, settings, name) for name in data_files(settings)})


def check_machine(settings: TrainSettings) -> None:
    """Raise InputError or RuntimeUnavailableError for an engine, optimizer or precision that cannot be had here."""
    from qalora_export.qalora.training.arguments import check_optimizer, compute_dtype

    check_engine()
    check_optimizer(settings.optimizer)
    compute_dtype(settings.precision)


def data_files(settings: TrainSettings) -> dict[str, Path]:
    """ "data" and, where it is given, "validation". Raises InputError without training data."""
    if settings.data is None:
        raise InputError("no training data", where="train.data", fix="pass --data FILE (JSONL or .txt)")
    files = {"data": settings.data, "validation": settings.validation}
    return {name: Path(path) for name, path in files.items() if path is not None}


def read_data(forecast: Forecast, settings: TrainSettings, name: str) -> SampleSet:
    """One of `data_files`, tokenized. Raises InputError as data.samples does."""
    from qalora_export.data.samples import load_samples
    from qalora_export.models.loading import load_tokenizer

    return load_samples(
        data_files(settings)[name],
        load_tokenizer(forecast.path),
        format=settings.format,
        sequence_length=settings.sequence_length,
        context=forecast.context,
        too_long=settings.too_long,
    )


def planned(forecast: Forecast, settings: TrainSettings, data: Mapping[str, SampleSet]) -> TrainPlan:
    """The plan for data that was read. Raises InputError for targets and pool lengths that fit no module."""
    import torch

    from qalora_export.qalora.training.arguments import Steps, compute_dtype
    from qalora_export.qalora.training.memory import estimate_memory

    samples, held_out = data["data"].samples, data["validation"].samples if "validation" in data else []
    rows = pack(samples, settings.sequence_length) if settings.packing else one_per_row(samples)
    longest = max(sum(map(len, row)) for row in rows)
    dtype = compute_dtype(settings.precision)
    memory = estimate_memory(
        forecast,
        settings.model_copy(update={"sequence_length": longest}),
        dtype=dtype,
        cuda=torch.cuda.is_available(),
        shards=shards(),
    )
    accounts = {name: found.account for name, found in data.items()}
    steps = Steps.of(len(rows), settings)
    return TrainPlan(tuple(rows), tuple(one_per_row(held_out)), steps, dtype, memory, accounts, forecast.untrained)
