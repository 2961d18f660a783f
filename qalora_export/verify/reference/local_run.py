"""The local proof of one artifact in one runtime: which sequences, what runs, and that looking changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qalora_runtimes.arrays import ProtocolError
from qalora_runtimes.protocol import Job
from qalora_runtimes.scoring import log_softmax

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.errors import RuntimeUnavailableError, UnsafeInputError
from qalora_export.models.families.family import activation
from qalora_export.progress import task
from qalora_export.verify.kernels.products import TappedGraph
from qalora_export.verify.probes.probe_set import ProbeSet
from qalora_export.verify.reference.local_proof import (
    DECODED,
    LocalProof,
    Mode,
    Sequences,
    Taps,
    chosen,
    passes_of,
    position_nmse,
    prove,
)
from qalora_export.verify.runtimes.record import Artifact, RuntimeRecord
from qalora_export.verify.runtimes.runs import watch_of

LaunchTaps = Callable[..., Any]
MODES: tuple[Mode, ...] = ("prefill", "decode")


@dataclass(frozen=True)
class Watched:
    """What was seen of one artifact. answers: log-probabilities (positions, vocabulary) of the runs looked into."""

    proof: LocalProof
    answers: Mapping[Mode, NDArray[np.float32]]


@dataclass(frozen=True)
class LocalRun:
    """One mode of one runtime. proof: every layer by itself. unwatched: largest NMSE between what this runtime answers
    when nobody looks inside and the answers of the run that was looked into.
    """

    proof: LocalProof
    unwatched: float


@dataclass
class LocalProofs:
    """Proves artifacts on demand; runtimes that show the same graph (record.taps_of) share one proof.

    launch: qalora_runtimes.taps.run_taps or a stand-in; None where a stand-in runtime has nothing inside to look at.
    """

    checkpoint: CanonicalCheckpoint
    probes: ProbeSet
    threads: int
    workdir: Path
    launch: LaunchTaps | None
    _known: dict[tuple[str, Path], Watched | RuntimeUnavailableError] = field(default_factory=dict)

    def watch(self, runtime: RuntimeRecord, shipped: Artifact) -> Watched | RuntimeUnavailableError:
        """Look inside, once; what stopped it is an answer too."""
        key = (runtime.taps_of, shipped.path)
        if key not in self._known:
            try:
                self._known[key] = self._prove(runtime, shipped)
            except RuntimeUnavailableError as error:
                self._known[key] = error
        return self._known[key]

    def of(self, runtime: RuntimeRecord, shipped: Artifact, mode: Mode, answers: NDArray[np.float32]) -> LocalRun:
        """answers: this runtime's own log-probabilities of `rows(mode)`.

        Raises RuntimeUnavailableError when the runtime is missing, crashes or does not show its graph.
        """
        known = self.watch(runtime, shipped)
        if isinstance(known, RuntimeUnavailableError):
            raise known
        proof = known.proof.of(mode)
        if hidden := proof.untapped.get(mode):  # not measured, which is another thing than wrong
            raise RuntimeUnavailableError(
                f"{runtime.taps_of} does not show {len(hidden)} of its products, {hidden[0]} for one",
                where=shipped.path,
            )
        return LocalRun(proof, float(position_nmse(answers, known.answers[mode]).max()))

    def rows(self, mode: Mode) -> NDArray[np.intp]:
        """Which positions of the probe set are looked at: whole sequences, or their first tokens."""
        starts, lengths = self.probes.starts, self.probes.lengths
        taken = {"prefill": lengths, "decode": np.minimum(lengths, DECODED)}[mode]
        return np.concatenate([np.arange(starts[i], starts[i] + taken[i]) for i in chosen(lengths)])

    def _sequences(self, mode: Mode) -> Sequences:
        ids = list(self.probes.sequences())
        return tuple(ids[i][: DECODED if mode == "decode" else None] for i in chosen(self.probes.lengths))

    def _prove(self, runtime: RuntimeRecord, shipped: Artifact) -> Watched:
        if self.launch is None:
            raise RuntimeUnavailableError(f"{runtime.name} does not show what is inside its graph", where=shipped.path)
        folder = self.workdir / f"{runtime.taps_of}-local"
        folder.mkdir(parents=True, exist_ok=True)
        graph = runtime.tapped_graph(shipped, self.checkpoint, folder)
        answers: dict[Mode, NDArray[np.float32]] = {}

        def taps(mode: Mode, asked: Sequences) -> Taps:
            found = self._taps(runtime, shipped, graph, mode, asked, folder / mode)
            if graph.logits in found:
                logits = found[graph.logits]
                answers[mode] = log_softmax(logits.reshape(len(logits), -1))
            return found

        try:
            proof = prove(
                self.checkpoint.path,
                graph,
                taps,
                {mode: self._sequences(mode) for mode in MODES},
                half_cache=runtime.half_cache,
                half_activation=activation(self.checkpoint.config) in runtime.rounding_activations,
                threads=self.threads,
            )
        except UnsafeInputError as error:  # NaN among the weights, which gate G0 names
            raise RuntimeUnavailableError(
                f"the weights of a product cannot be read: {error.what}", where=error.where
            ) from error
        except ProtocolError as error:
            raise RuntimeUnavailableError(
                f"{runtime.taps_of} ended without usable values", where=shipped.path, why=str(error)
            ) from error
        return Watched(proof, answers)

    def _taps(
        self,
        runtime: RuntimeRecord,
        shipped: Artifact,
        graph: TappedGraph,
        mode: Mode,
        asked: Sequences,
        workdir: Path,
    ) -> Mapping[str, NDArray[np.float32]]:
        job = Job(asked, mode)
        with task(f"{runtime.taps_of}: values of every layer", job.total) as shown:
            assert self.launch is not None
            result = self.launch(
                runtime.taps_of,
                model=graph.model,
                job=job,
                names=passes_of(graph, job.total),
                workdir=workdir,
                threads=self.threads,
                lora=graph.lora,
                data=graph.data,
                watch=watch_of(runtime.taps_of, shipped.path, job, shown),
            )
        if result.status != "ok":
            raise RuntimeUnavailableError(f"{runtime.taps_of} {result.status}: {result.message}", where=shipped.path)
        found: Mapping[str, NDArray[np.float32]] = result.taps
        return found
