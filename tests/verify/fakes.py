"""A stand-in for qalora_runtimes.launch.run_runner: a runtime that is right everywhere, or wrong in one stated way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from qalora_runtimes.launch import RunnerResult
from qalora_runtimes.protocol import read_job

from qalora_export.verify.gates.g5_text import expected_answers
from qalora_export.verify.probes.probe_set import ProbeSet
from qalora_export.verify.reference.logits import reference_logprobs
from qalora_export.verify.reference.text import folder_answers
from qalora_export.verify.runtimes.record import all_runtimes

Change = Callable[[np.ndarray], np.ndarray]


@cache
def right_logprobs(checkpoint: Path, ids: bytes, lengths: bytes) -> np.ndarray:
    probes = ProbeSet(np.frombuffer(ids, np.int32), np.frombuffer(lengths, np.int32), ())
    return reference_logprobs(checkpoint, probes, threads=1).logprobs


@dataclass
class FakeRuntimes:
    """changes: (runtime, "exact" | "shipped", mode) -> what is done to the right log-probabilities.

    broken: the same keys -> a RunnerResult to return instead. answers: changes a runtime's answers about text.
    """

    checkpoint: Path
    changes: dict[tuple[str, str, str], Change] = field(default_factory=dict)
    broken: dict[tuple[str, str, str], RunnerResult] = field(default_factory=dict)
    answers: dict[str, Callable[[dict[str, Any]], None]] = field(default_factory=dict)

    def __call__(self, runtime: str, *, job: Path, exact: bool, **_: object) -> RunnerResult:
        request = read_job(job)
        path = "exact" if exact else "shipped"
        alone = request.text is not None and len(request.passes) == 1
        keys = [] if alone else [(runtime, path, each) for each in request.passes]
        for key in [*keys, *([(runtime, path, "text")] if request.text else [])]:
            if key in self.broken:
                return self.broken[key]
        ids = np.concatenate(request.sequences)
        lengths = np.array([len(s) for s in request.sequences], np.int32)
        right = right_logprobs(self.checkpoint, ids.tobytes(), lengths.tobytes())
        passes = [self.changes.get(key, lambda right: right)(right.copy()) for key in keys] or [right]
        text = self._text(runtime, request)
        return RunnerResult("ok", "", passes[0], text, {"version": "fake"}, decoded=dict(enumerate(passes)).get(1))

    def _text(self, runtime: str, request: Any) -> dict[str, Any] | None:
        if request.text is None:
            return None
        probes = ProbeSet(np.zeros(1, np.int32), np.ones(1, np.int32), ("",), request.text.texts, request.text.chats)
        right = expected_answers(folder_answers(self.checkpoint, probes), all_runtimes()[runtime].habits)
        answers = {key: [list(v) if isinstance(v, list) else v for v in values] for key, values in right.items()}
        self.answers.get(runtime, lambda _: None)(answers)
        return answers
