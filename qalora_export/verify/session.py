"""What the gates of one run share: the session (checkpoint, probe set, reference) and one target per runtime.

A target measures on demand and once: what several gates look at (the logits of a path, the local proof) is there from
the first gate that asks. What the runtime refuses is kept as well, and raised again for every gate that needed it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from qalora_runtimes.protocol import LongSequence

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.generation import Generation, generation_of
from qalora_export.checkpoint.provenance import Link, artifact_manifest
from qalora_export.errors import InputError, RuntimeUnavailableError
from qalora_export.formats.account import Account
from qalora_export.models.families.family import Format, activation
from qalora_export.models.loading import load_tokenizer
from qalora_export.recipe import VerifySettings
from qalora_export.safety import HashedOnce
from qalora_export.verify.identity import Identities
from qalora_export.verify.metrics import EXACT, PositionMetrics, following_ids, position_metrics
from qalora_export.verify.probes.behaviour import BehaviourProbes, decoded, long_sequence, make_behaviour
from qalora_export.verify.probes.probe_set import ProbeSet
from qalora_export.verify.reference.ancestry import Ancestry
from qalora_export.verify.reference.answers import GreedyReference
from qalora_export.verify.reference.costliest import Costliest, costliest
from qalora_export.verify.reference.lineage import Member
from qalora_export.verify.reference.local_proof import Mode
from qalora_export.verify.reference.local_run import MODES, LocalProofs, LocalRun
from qalora_export.verify.reference.logits import Reference, long_logprobs, rounding_noise
from qalora_export.verify.reference.merge_check import MergeCheck
from qalora_export.verify.runtimes.record import Artifact, RuntimeRecord, all_runtimes
from qalora_export.verify.runtimes.runs import Runs

V = TypeVar("V")
RunPath = Literal["exact", "shipped"]
Outcome = PositionMetrics | RuntimeUnavailableError  # what was measured, or what stopped it


@dataclass
class Session:
    """One checkpoint under verification.

    simulation: what rounding the input of every quantized layer to int8 does to the reference; a yardstick, no bound.
    lineage: the models that it was made from, and itself. expected_text: what its own tokenizer answers to the texts.
    chain: the checkpoint's ancestry; links: of the artifacts, as found. merge: whether it is its base plus its adapter;
    ancestry: whether it kept everything else.
    files: of checkpoint and artifacts, as they were before the first gate; hashed: what they and their ancestors were
    hashed to.
    kept: which answers are an earlier run's (verify.store).
    """

    checkpoint: CanonicalCheckpoint
    settings: VerifySettings
    probes: ProbeSet
    reference: Reference
    simulation: PositionMetrics
    lineage: tuple[Member, ...]
    expected_text: dict[str, list[Any]]
    chain: list[Link]
    merge: MergeCheck
    ancestry: Ancestry
    runs: Runs
    local: LocalProofs
    workdir: Path
    hashed: HashedOnce = field(default_factory=HashedOnce)
    reference_seconds: float = 0.0
    kept: list[str] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    files: Identities = field(default_factory=dict)
    _costliest: Costliest | None = None
    _noise: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    _long: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    _accounts: dict[Path, Account | InputError] = field(default_factory=dict)

    def account(self, runtime: RuntimeRecord, artifact: Path, contents: Any) -> Account | InputError:
        """Every entry of an artifact against a fresh export, made once for all runtimes of one artifact; why there
        can be no fresh export, where there can be none.
        """
        if artifact not in self._accounts:
            try:
                self._accounts[artifact] = runtime.account(self.checkpoint, artifact, contents, self.hashed)
            except InputError as error:
                self._accounts[artifact] = error
        return self._accounts[artifact]

    def costliest(self, kl: NDArray[np.float64]) -> Costliest:
        """reference.costliest, tried once: on the dearest sequence of the first runtime that asks."""
        if self._costliest is None:
            path, threads = self.checkpoint.path, self.settings.threads
            self._costliest = costliest(path, self.probes, kl, threads=threads)
        return self._costliest

    def __post_init__(self) -> None:
        self.runs.behaviour_asked = lambda: self.behaviour.request
        self.runs.long_asked = lambda runtime: self.long(all_runtimes()[runtime].format)[0]

    def long(self, fmt: Format) -> tuple[LongSequence, NDArray[np.float32]]:
        """A sequence that reaches the end of an export's context, and the reference at its positions."""
        sequence = long_sequence(self.checkpoint.config, fmt, self.probes, self.settings)
        length = len(sequence.ids)
        if length not in self._long:
            self._long[length] = long_logprobs(self.checkpoint.path, sequence, threads=self.settings.threads)
        return sequence, self._long[length]

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's own."""
        return load_tokenizer(self.checkpoint.path)

    @cached_property
    def generation(self) -> Generation:
        """How the checkpoint's folder generates."""
        return generation_of(self.checkpoint.path, self.checkpoint.config)

    @cached_property
    def behaviour(self) -> BehaviourProbes:
        """What gate G6 asks of every runtime."""
        return make_behaviour(self.tokenizer, self.checkpoint.config, self.generation, self.probes, self.settings)

    @cached_property
    def greedy(self) -> GreedyReference:
        return GreedyReference(self.checkpoint.path, self.settings.threads)

    def answer_texts(self, answers: list[list[int]]) -> list[str]:
        """What Hugging Face's tokenizer shows of answers, an end token that is no special one included."""
        anchor = self.behaviour.request.anchor
        before, *texts = decoded(self.tokenizer, [[anchor], *([anchor, *tokens] for tokens in answers)], hide=True)
        return [text.removeprefix(before) for text in texts]

    def noise(self, positions: NDArray[np.bool_]) -> NDArray[np.float64]:
        """reference.logits.rounding_noise (positions,) in the sequences that hold one of `positions`, 0 in others."""
        starts = self.probes.starts
        asked = np.unique(np.searchsorted(starts, np.flatnonzero(positions), side="right") - 1)
        fresh = [int(index) for index in asked if int(index) not in self._noise]
        if fresh:
            some = self.probes.some(fresh)
            rows = np.concatenate([np.arange(starts[i], starts[i] + self.probes.lengths[i]) for i in fresh])
            exact = self.reference.logprobs[rows]
            found = rounding_noise(self.checkpoint.path, some, exact, threads=self.settings.threads)
            self._noise |= dict(zip(fresh, np.split(found, some.starts[1:]), strict=True))
        noise = np.zeros(len(positions))
        for index in asked:
            noise[starts[index] : starts[index] + self.probes.lengths[index]] = self._noise[int(index)]
        return noise


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
