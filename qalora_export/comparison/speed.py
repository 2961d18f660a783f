"""How fast llama.cpp decodes a GGUF file, beside the 16-bit base in the same turns.

Speed depends on layout and types, not on values, so a layout is timed once, whatever was trained in it. Both files take
turns, each turn a process of its own, and the ratio is the median over the turns: what else the machine does meanwhile
hits both alike.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from qalora_runtimes.launch import run_runner
from qalora_runtimes.protocol import Job

from qalora_export.comparison.bench import Bench
from qalora_export.comparison.cells import Speed
from qalora_export.comparison.method import Artifact
from qalora_export.progress import track
from qalora_export.verify.runtimes.runs import run_error

RUNTIME = "llama.cpp"
TURNS, TOKENS = 5, 64


@dataclass
class Speeds:
    """Of every file that was asked for, timed once."""

    bench: Bench
    known: dict[Path, Speed] = field(default_factory=dict)

    def of(self, artifact: Artifact, bits: int | None) -> Speed:
        """Raises RuntimeUnavailableError when llama.cpp does not run the file."""
        file = artifact(self.bench, bits)
        if file not in self.known:
            self.known[file] = self._timed(file)
        return self.known[file]

    def _timed(self, file: Path) -> Speed:
        base = self.bench.gguf_16
        with self.bench.scratch("speed") as folder:
            turns = [
                (self._once(base, folder), self._once(file, folder))
                for _ in track(range(TURNS), f"llama.cpp on {file.name}, turns")
            ]
        return Speed(
            statistics.median(mine for _, mine in turns),
            statistics.median(mine / theirs for theirs, mine in turns),
            self.bench.gguf_bits(file),
        )

    def _once(self, file: Path, folder: Path) -> float:
        """Tokens per second of one process."""
        ids = np.random.default_rng(0).integers(0, self.bench.vocabulary, TOKENS, dtype=np.int32)
        found = run_runner(
            RUNTIME,
            model=file,
            job=Job((ids,), "decode"),
            workdir=folder,
            threads=self.bench.recipe.verify.threads,
            vocabulary=self.bench.vocabulary,
        )
        if found.status != "ok":
            raise run_error(RUNTIME, file, found)
        return float(found.fingerprint["decode_tokens_per_second"])
