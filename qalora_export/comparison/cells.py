"""One model of a comparison, and what was measured of it, as one JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qalora_export.errors import UnsafeInputError
from qalora_export.safety import atomic_file, read_json

FORMAT = "qalora-comparison-cell/1"


@dataclass(frozen=True, slots=True)
class Cell:
    """bits: None for 16-bit weights. rate: the learning rate, None where nothing is trained."""

    method: str
    bits: int | None
    seed: int
    rate: float | None

    @property
    def name(self) -> str:
        """File name without suffix, the same for the same cell."""
        parts = [self.method, f"{self.bits or 16}bit", f"seed{self.seed}"]
        return ".".join(parts + ([] if self.rate is None else [f"lr{self.rate:g}"]))


@dataclass(frozen=True, slots=True)
class Speed:
    """Of llama.cpp decoding token by token: tokens per second, and how many times those of the 16-bit base in the same
    turns. bits_per_weight: of the decoder layers' matrices in the GGUF file, whose blocks hold 2 and 3 bits in 4.
    """

    tokens_per_second: float
    of_base: float
    bits_per_weight: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What a cell came to.

    held_out_loss: nats per learned token of the held-out data; None when training diverged. text_loss: the same of the
    held-out text, None without one. validation_loss: of the validation data, which chooses the learning rate. exact of
    total: the task score, None without one. bits_per_weight: of the decoder layers' matrices as deployed, scales,
    offsets and an unmerged adapter included. trainable: parameters. seconds: of training steps. ships: how the model is
    deployed. gates: what verify-parity said of its exports ("21/21", or the first gate that failed), None where it was
    not asked. speed: of llama.cpp on the GGUF file that is deployed, None where it was not timed or there is none.
    answered: exact answers of total by llama.cpp on that file, of the first seed, None where it was not asked.
    """

    cell: Cell
    held_out_loss: float | None
    validation_loss: float | None
    exact: int | None
    total: int | None
    bits_per_weight: float
    trainable: int
    seconds: float
    ships: str
    gates: str | None = None
    speed: Speed | None = None
    answered: int | None = None
    text_loss: float | None = None

    @property
    def score(self) -> float | None:
        """Share of exact answers."""
        return None if self.exact is None or not self.total else self.exact / self.total


def write(path: Path, measured: Measured, made_of: str) -> None:
    """One cell's file; made_of: hash of everything that decides its numbers."""
    with atomic_file(path, force=True) as temporary:
        content = {"format": FORMAT, "made_of": made_of} | asdict(measured)
        temporary.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def read(path: Path, made_of: str) -> Measured | None:
    """What `write` wrote, None when there is none or it is of other data, settings or versions.

    Raises UnsafeInputError for a file that is no cell.
    """
    if not path.exists():
        return None
    content: Any = read_json(path)
    try:
        if content.pop("format") != FORMAT:
            raise KeyError("format")
        same = content.pop("made_of") == made_of
        speed = content.pop("speed", None)  # cells of before it was timed have none
        parts = {"cell": Cell(**content["cell"]), "speed": None if speed is None else Speed(**speed)}
        measured = Measured(**content | parts)
    except (AttributeError, KeyError, TypeError) as error:
        raise UnsafeInputError(
            "not a cell of a comparison", where=path, why=str(error), fix="delete the file, it is made again"
        ) from error
    return measured if same else None
