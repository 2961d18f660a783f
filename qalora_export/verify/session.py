"""What the gates of all runtimes share in one run: checkpoint, probe set, reference, and what PyTorch answers to them.

What is not needed by every run is computed on demand and once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qalora_runtimes.protocol import LongSequence

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.generation import Generation, generation_of
from qalora_export.checkpoint.provenance import Link
from qalora_export.errors import InputError
from qalora_export.formats.account import Account
from qalora_export.models.families.family import Format
from qalora_export.models.loading import load_tokenizer
from qalora_export.recipe import VerifySettings
from qalora_export.safety import HashedOnce
from qalora_export.verify.identity import Identities
from qalora_export.verify.metrics import PositionMetrics
from qalora_export.verify.probes.behaviour import BehaviourProbes, decoded, long_sequence, make_behaviour
from qalora_export.verify.probes.probe_set import ProbeSet
from qalora_export.verify.reference.ancestry import Ancestry
from qalora_export.verify.reference.answers import GreedyReference
from qalora_export.verify.reference.costliest import Costliest, costliest
from qalora_export.verify.reference.lineage import Member
from qalora_export.verify.reference.local_run import LocalProofs
from qalora_export.verify.reference.logits import Reference, long_logprobs, rounding_noise
from qalora_export.verify.reference.merge_check import MergeCheck
from qalora_export.verify.reference.task import Task
from qalora_export.verify.rule import Entry
from qalora_export.verify.runtimes.record import RuntimeRecord, all_runtimes
from qalora_export.verify.runtimes.runs import Runs


@dataclass
class Session:
    """One checkpoint under verification.

    simulation: what rounding the input of every quantized layer to int8 does to the reference; a yardstick, no bound.
    lineage: the models that it was made from, and itself. expected_text: what its own tokenizer answers to the texts.
    chain: the checkpoint's ancestry; links: of the artifacts, as found. merge: whether it is its base plus its adapter;
    ancestry: whether it kept everything else.
    files: of checkpoint and artifacts, as they were before the first gate; hashed: what they and their ancestors were
    hashed to.
    kept: which answers are an earlier run's (verify.store). task: what every model and runtime is asked for its score.
    dequantized: what gate G1 found of an artifact by a dequantizer.
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
    task: Task | None = None
    hashed: HashedOnce = field(default_factory=HashedOnce)
    reference_seconds: float = 0.0
    kept: list[str] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    dequantized: dict[tuple[str, Path], Entry] = field(default_factory=dict)
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
        self.runs.scored = self.task.questions if self.task else ()

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
