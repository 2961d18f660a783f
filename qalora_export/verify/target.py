"""One runtime and the artifact that it is verified on: what the gates of this runtime share.

It measures on demand and once: what several gates look at (the logits of a path, the local proof) is there from the
first gate that asks. What the runtime refuses is kept as well, and raised again for every gate that needed it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.provenance import artifact_manifest
from qalora_export.errors import InputError, RuntimeUnavailableError
from qalora_export.models.families.family import activation
from qalora_export.verify.metrics import EXACT, PositionMetrics, following_ids, position_metrics
from qalora_export.verify.reference.local_proof import Mode
from qalora_export.verify.reference.local_run import MODES, LocalRun
from qalora_export.verify.reference.task import Score
from qalora_export.verify.runtimes.record import Artifact, RuntimeRecord
from qalora_export.verify.session import Session

V = TypeVar("V")
RunPath = Literal["exact", "shipped"]
Outcome = PositionMetrics | RuntimeUnavailableError  # what was measured, or what stopped it


@dataclass
class Target:
    """One runtime and the artifact it is verified on."""

    session: Session
    runtime: RuntimeRecord
    artifact: Path
    _exact: Artifact | RuntimeUnavailableError | None = None
    _answers: dict[Mode, NDArray[np.float32]] = field(default_factory=dict)
    _measured: dict[RunPath, tuple[Outcome, Outcome]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.runtime.name

    @property
    def workdir(self) -> Path:
        folder = self.session.workdir / self.name
        folder.mkdir(exist_ok=True)
        return folder

    @property
    def roots(self) -> list[Path]:
        """The files and folders that are verified here."""
        beside = [artifact_manifest(self.artifact), self.shipped.lora]
        return [self.session.checkpoint.path, self.artifact, *(path for path in beside if path is not None)]

    @property
    def shipped(self) -> Artifact:
        """What users run."""
        return self.runtime.shipped(self.artifact)

    @property
    def exact(self) -> Artifact:
        """The same numbers for rounding-free kernels."""
        if self._exact is None:
            self._exact = _attempt(lambda: self.runtime.exact(self.artifact, self.workdir))
        return _value(self._exact)

    def watch(self) -> None:
        """Look into the shipped path now, so that `local` need not when answers are there."""
        self.session.local.watch(self.runtime, self.shipped)

    def local(self, mode: Mode) -> LocalRun:
        """Every layer of the shipped path by itself. Raises RuntimeUnavailableError."""
        _value(self._logits("shipped")[MODES.index(mode)])
        return self.session.local.of(self.runtime, self.shipped, mode, self._answers[mode])

    def prefill(self, path: RunPath) -> PositionMetrics:
        """Whole prompts against the reference, every position."""
        return _value(self._logits(path)[0])

    def decode(self, path: RunPath) -> PositionMetrics:
        """Token by token with the KV cache, against the prefill or, on the shipped path, against the reference.

        Int8 kernels round differently for one token than for many, so the shipped path's decode is held to the same
        reference and bound as its prefill; the exact path has no such excuse and must agree with itself. Without a
        prefill there is nothing that decode could be equal to, so it is not run.
        """
        return _value(self._logits(path)[1])

    def score(self, path: RunPath) -> Score:
        """Of the session's task, by the runtime's own generation. Raises RuntimeUnavailableError."""
        task = self.session.task
        assert task is not None, "no task was asked"
        artifact = self.exact if path == "exact" else self.shipped
        return task.score(self.name, self.session.runs.task_answers(self.name, artifact, exact=path == "exact"))

    @property
    def positions(self) -> dict[str, PositionMetrics]:
        """Per-position metrics of everything that was measured, by path, for the report."""
        found: dict[str, Outcome | None] = {}
        for path, (prefill, decode) in self._measured.items():
            found |= {path: prefill, f"{path} decode": decode}
        if isinstance(found.get("shipped"), PositionMetrics):
            found["simulated"] = self.session.simulation
        return {name: metrics for name, metrics in found.items() if isinstance(metrics, PositionMetrics)}

    def _logits(self, path: RunPath) -> tuple[Outcome, Outcome]:
        """(prefill, decode)"""
        if path not in self._measured:
            self._measured[path] = self._both_modes(path)
        return self._measured[path]

    def _both_modes(self, path: RunPath) -> tuple[Outcome, Outcome]:
        reference, following = self.session.reference.logprobs, self._following
        try:
            prefill = self._run(path, "prefill")
        except RuntimeUnavailableError as error:
            return error, error
        measured = position_metrics(reference, prefill, following)
        against = prefill if path == "exact" and not measured.bad.any() else reference
        try:
            decoded = position_metrics(against, self._run(path, "decode"), following)
        except RuntimeUnavailableError as error:
            return self._scaled(path, measured), error
        return self._scaled(path, measured), self._scaled(path, decoded)

    def _run(self, path: RunPath, mode: Mode) -> NDArray[np.float32]:
        artifact = self.exact if path == "exact" else self.shipped
        found = self.session.runs.logprobs(self.name, artifact, mode, exact=path == "exact")
        if path == "shipped":
            self._answers[mode] = found[self.session.local.rows(mode)]
        if path == "exact" and self._rounding_operator and self.replaced(mode) is None:
            raise RuntimeUnavailableError(
                f"{self.name} rounds in its operator {self._rounding_operator}, which this run did not replace",
                where=artifact.path,
                why="only the C API of xllamacpp can do that; logits through the table are no exact path",
                fix="install a release of xllamacpp that qalora-export doctor knows",
            )
        return found

    def replaced(self, mode: Mode) -> Mapping[str, Any] | None:
        """What the runner says of the rounding operator that it replaced on the exact path; None where there is none.

        values: how many; kept: those that were not what the operator should have given, left as they were; nmse: of
        the operator's own values.
        """
        said = self.session.runs.fingerprints.get(f"{self.name}/exact/{mode}", {}).get("replaced")
        found = said.get(self._rounding_operator) if isinstance(said, Mapping) else None
        return found if isinstance(found, Mapping) else None

    @property
    def _rounding_operator(self) -> str | None:
        return self.runtime.rounding_activations.get(activation(self.session.checkpoint.config))

    def _scaled(self, path: RunPath, measured: PositionMetrics) -> PositionMetrics:
        """The exact path's metrics know how much a position amplifies rounding, where that decides."""
        above = measured.nmse > EXACT
        if path == "shipped" or not above.any():
            return measured
        try:
            return measured.scaled_by(self.session.noise(above))
        except InputError:  # the checkpoint was changed under us, which gate G0 names; unscaled is the harder bound
            return measured

    @property
    def _following(self) -> NDArray[np.int32]:
        return following_ids(self.session.probes.ids, self.session.probes.lengths)


def _attempt(step: Callable[[], V]) -> V | RuntimeUnavailableError:
    """The step's value, or the runtime's failure; bad and unsafe input still end the run."""
    try:
        return step()
    except RuntimeUnavailableError as error:
        return error


def _value(known: V | RuntimeUnavailableError) -> V:
    if isinstance(known, RuntimeUnavailableError):
        raise known
    return known
