"""Runs of the probe set through runtimes, each in a process of its own (qalora_runtimes.launch)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from qalora_runtimes.heartbeat import Beat
from qalora_runtimes.process import Watch, patience_for
from qalora_runtimes.protocol import Job, TextRequest, write_job

from qalora_export.errors import RuntimeUnavailableError
from qalora_export.progress import Task, task
from qalora_export.verify.probes.probe_set import ProbeSet
from qalora_export.verify.runtimes.record import Artifact

Mode = Literal["prefill", "decode"]
logger = logging.getLogger(__name__)


@dataclass
class Runs:
    """Runs `probes` and keeps what each run said about itself.

    launch: qalora_runtimes.launch.run_runner or a stand-in with its signature. fingerprints: one per run, by
    "runtime/path/mode".
    """

    probes: ProbeSet
    vocabulary: int
    workdir: Path
    threads: int
    launch: Callable[..., Any]
    fingerprints: dict[str, dict[str, Any]] = field(default_factory=dict)

    def logprobs(
        self, runtime: str, artifact: Artifact, mode: Mode, *, exact: bool, label: str | None = None
    ) -> NDArray[np.float32]:
        """float32 (positions, vocabulary). Raises RuntimeUnavailableError when the runtime is missing or crashed."""
        label = label or ("exact" if exact else "shipped")
        result = self._run(runtime, artifact, self.probes, mode, exact=exact, label=label, text=False)
        values: NDArray[np.float32] | None = result.logprobs
        expected = (int(self.probes.ids.size), self.vocabulary)
        if values is None or values.shape != expected or values.dtype != np.float32:
            found = "nothing" if values is None else f"{values.dtype}{values.shape}"
            raise RuntimeUnavailableError(
                f"{runtime} answered {found}, not float32{expected}",
                where=artifact.path,
                why="it ran another vocabulary or lost positions",
            )
        return values

    def text_answers(self, runtime: str, artifact: Artifact) -> dict[str, Any]:
        """Gate G5's answers {"texts": [[ids]…], "rendered": [str…]}; the shortest logits job goes along."""
        shortest = int(np.argmin(self.probes.lengths))
        start, length = int(self.probes.starts[shortest]), self.probes.lengths[shortest : shortest + 1]
        small = ProbeSet(
            self.probes.ids[start : start + int(length[0])],
            length,
            (self.probes.names[shortest],),
            self.probes.texts,
            self.probes.chats,
        )
        result = self._run(runtime, artifact, small, "prefill", exact=False, label="text", text=True)
        if not isinstance(result.text_answers, dict):
            raise RuntimeUnavailableError(f"{runtime} gave no answers about text", where=artifact.path)
        return result.text_answers

    def _run(
        self, runtime: str, artifact: Artifact, probes: ProbeSet, mode: Mode, *, exact: bool, label: str, text: bool
    ) -> Any:
        workdir = self.workdir / f"{runtime}-{label}-{mode}"
        workdir.mkdir(parents=True, exist_ok=True)
        job = workdir / "job.npz"
        request = TextRequest(probes.texts, probes.chats) if text else None
        write_job(job, Job(tuple(probes.sequences()), mode, request))
        with task(f"{runtime}: {label} {'texts' if text else mode}", int(probes.ids.size)) as shown:
            result = self.launch(
                runtime,
                model=artifact.path,
                job=job,
                workdir=workdir,
                exact=exact,
                threads=self.threads,
                lora=artifact.lora,
                vocabulary=self.vocabulary,
                watch=watch_of(runtime, artifact.path, int(probes.lengths.max()), shown),
            )
        if result.status != "ok":
            raise RuntimeUnavailableError(
                f"{runtime} {result.status}: {result.message}",
                where=artifact.path,
                why=f"signal {result.signal_name}" if result.signal_name else "",
            )
        self.fingerprints[f"{runtime}/{label}/{mode}"] = dict(result.fingerprint or {})
        return result


def watch_of(runtime: str, model: Path, longest: int, shown: Task) -> Watch:
    """How long a run may be silent; what it tells goes to `shown`, and its silence to the log."""

    def on_beat(beat: Beat) -> None:
        shown.update(beat.done if beat.total else 0, "" if beat.total else beat.what)

    return Watch(
        patience_for(model, longest),
        on_beat=on_beat,
        on_silence=lambda line: logger.warning("%s: %s", runtime, line),
    )
