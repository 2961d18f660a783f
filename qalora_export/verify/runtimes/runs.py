"""Runs of the probe set through runtimes, each in a process of its own (qalora_runtimes.launch)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from qalora_runtimes.behaviour import ANSWER_KEYS, Question, Request
from qalora_runtimes.heartbeat import TOKENS, Beat
from qalora_runtimes.process import Watch, patience_for
from qalora_runtimes.protocol import Job, LongSequence, TextRequest, write_job

from qalora_export.checkpoint.manifest import is_unchanged
from qalora_export.errors import RuntimeUnavailableError
from qalora_export.progress import Task, task
from qalora_export.verify.probes.probe_set import ProbeSet
from qalora_export.verify.runtimes.record import Artifact

Mode = Literal["prefill", "decode"]
EXACT, SHIPPED, TEXT, BEHAVIOUR, LONG = "exact", "shipped", "text", "behaviour", "long"  # labels of runs
WHOLE, SCORED = "everything", "scored"
# Of a run, by its label; of both also SCORED, where there is a task.
PARTS = {SHIPPED: ("prefill", "decode", TEXT, BEHAVIOUR), EXACT: ("prefill", "decode", LONG)}
LOG_SHOWN = 600  # characters
logger = logging.getLogger(__name__)


class CrashedError(RuntimeUnavailableError):
    """The runtime is installed and its run failed."""


@dataclass
class Runs:
    """Runs `probes` and keeps what each run said about itself.

    A model is loaded once for all that is asked of it: whole prompts, token by token, and the texts and answers of what
    ships. What is asked second waits here for its gate. Where such a run fails, each part is run alone, so that a gate
    is not stopped by what another one asks.

    launch: qalora_runtimes.launch.run_runner or a stand-in with its signature. behaviour_asked: what gate G6 will ask
    of what ships; long_asked: and of the exact path of a runtime. scored: a task's questions, asked of both paths.
    fingerprints: one per run, by "runtime/path/mode".
    """

    probes: ProbeSet
    vocabulary: int
    workdir: Path
    threads: int
    launch: Callable[..., Any]
    behaviour_asked: Callable[[], Request] | None = None
    long_asked: Callable[[str], LongSequence] | None = None
    scored: tuple[Question, ...] = ()
    fingerprints: dict[str, dict[str, Any]] = field(default_factory=dict)
    _waiting: dict[tuple[str, str, str], Any] = field(default_factory=dict)

    def logprobs(self, runtime: str, artifact: Artifact, mode: Mode, *, exact: bool) -> NDArray[np.float32]:
        """float32 (positions, vocabulary). Raises RuntimeUnavailableError when the runtime is missing or crashed."""
        label = EXACT if exact else SHIPPED
        if (runtime, label, mode) not in self._waiting:
            self._everything(runtime, artifact, label)
        values = self._waiting.pop((runtime, label, mode), None)
        if values is None:
            values = self._alone(runtime, artifact, label, mode).logprobs
        return self._checked(runtime, artifact, values)

    def text_answers(self, runtime: str, artifact: Artifact) -> dict[str, Any]:
        """Gate G5's answers (qalora_runtimes.protocol.TEXT_ANSWER_KEYS)."""
        answers = self._waiting.pop((runtime, SHIPPED, TEXT), None)
        if answers is None:
            answers = self._alone(runtime, artifact, SHIPPED, TEXT).text_answers
        if not isinstance(answers, dict):
            raise RuntimeUnavailableError(f"{runtime} gave no answers about text", where=artifact.path)
        return answers

    def behaviour(self, runtime: str, artifact: Artifact, request: Request) -> dict[str, Any]:
        """Gate G6's answers (qalora_runtimes.behaviour.ANSWER_KEYS), complete."""
        found = self._waiting.pop((runtime, SHIPPED, BEHAVIOUR), None)
        if found is None:
            found = self._alone(runtime, artifact, SHIPPED, BEHAVIOUR, request).behaviour
        if not isinstance(found, dict) or not ANSWER_KEYS.keys() <= found.keys():
            raise RuntimeUnavailableError(f"{runtime} gave no answers", where=artifact.path)
        return found

    def long(self, runtime: str, exact: Artifact, sequence: LongSequence) -> NDArray[np.float32]:
        """float32 (k, vocabulary) at the positions of a long sequence, on the exact path."""
        found = self._waiting.pop((runtime, EXACT, LONG), None)
        if found is None:
            found = self._alone(runtime, exact, EXACT, LONG, sequence).long
        if found is None or found.shape != (len(sequence.at), self.vocabulary):
            raise RuntimeUnavailableError(f"{runtime} gave no answers to a long sequence", where=exact.path)
        return np.asarray(found)

    def task_answers(self, runtime: str, artifact: Artifact, *, exact: bool) -> list[dict[str, Any]]:
        """One answer to each of `scored`: tokens, and text where the runtime has a tokenizer."""
        label = EXACT if exact else SHIPPED
        found = self._waiting.pop((runtime, label, SCORED), None)
        if found is None:
            said = self._alone(runtime, artifact, label, SCORED).behaviour
            found = said.get(SCORED) if isinstance(said, dict) else None
        if not isinstance(found, list) or not all(isinstance(answer, dict) for answer in found):
            raise RuntimeUnavailableError(f"{runtime} gave no answers to the task", where=artifact.path)
        return found

    def _everything(self, runtime: str, artifact: Artifact, label: str) -> None:
        """One run for all that this artifact will be asked. Nothing waits when it crashes."""
        try:
            result = self._whole(runtime, artifact, label)
        except CrashedError as error:
            logger.warning("%s; asking for one thing at a time", error)
            return
        found = {"prefill": result.logprobs, "decode": result.decoded, TEXT: result.text_answers}
        found |= {BEHAVIOUR: result.behaviour, LONG: result.long, SCORED: (result.behaviour or {}).get(SCORED)}
        self._waiting |= {(runtime, label, what): value for what, value in found.items() if value is not None}

    def rehearse(self, runtime: str, artifact: Artifact, *, exact: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
        """(name, run) of every run that an artifact can be asked for on a path: all at once, then each part alone."""
        label = EXACT if exact else SHIPPED
        yield WHOLE, lambda: self._whole(runtime, artifact, label)
        for part in (*PARTS[label], *([SCORED] if self.scored else [])):
            yield part, partial(self._alone, runtime, artifact, label, part)

    def _whole(self, runtime: str, artifact: Artifact, label: str) -> Any:
        asked = self.behaviour_asked() if self.behaviour_asked and label == SHIPPED else None
        if self.scored:
            asked = replace(asked or Request(), scored=self.scored)
        long = self.long_asked(runtime) if self.long_asked and label == EXACT else None
        text = label == SHIPPED
        return self._run(runtime, artifact, self.probes, "both", label=label, text=text, asked=asked, long=long)

    def _alone(self, runtime: str, artifact: Artifact, label: str, part: str, asked: Any = None) -> Any:
        """One part of PARTS[label], or SCORED. asked: the request or long sequence, where the caller has it."""
        if part == TEXT:
            return self._run(runtime, artifact, self._shortest, "prefill", label=TEXT, text=True)
        if part == BEHAVIOUR:
            asked = asked or (self.behaviour_asked and self.behaviour_asked())
            return self._run(runtime, artifact, self._shortest, "prefill", label=BEHAVIOUR, asked=asked)
        if part == SCORED:
            asked = Request(scored=self.scored)
            return self._run(runtime, artifact, self._shortest, "prefill", label=label, asked=asked)
        if part == LONG:
            asked = asked or (self.long_asked and self.long_asked(runtime))
            return self._run(runtime, artifact, self._shortest, "prefill", label=EXACT, long=asked)
        return self._run(runtime, artifact, self.probes, part, label=label)

    def _checked(self, runtime: str, artifact: Artifact, values: NDArray[np.float32] | None) -> NDArray[np.float32]:
        expected = (int(self.probes.ids.size), self.vocabulary)
        if values is None or values.shape != expected or values.dtype != np.float32:
            found = "nothing" if values is None else f"{values.dtype}{values.shape}"
            raise RuntimeUnavailableError(
                f"{runtime} answered {found}, not float32{expected}",
                where=artifact.path,
                why="it ran another vocabulary or lost positions",
            )
        return values

    @property
    def _shortest(self) -> ProbeSet:
        """The shortest sequence alone, with all texts: the least that a run can be asked beside them."""
        alone = self.probes.some([int(np.argmin(self.probes.lengths))])
        return replace(alone, texts=self.probes.texts, chats=self.probes.chats)

    def _run(
        self,
        runtime: str,
        artifact: Artifact,
        probes: ProbeSet,
        mode: str,
        *,
        label: str,
        text: bool = False,
        asked: Request | None = None,
        long: LongSequence | None = None,
    ) -> Any:
        workdir = self.workdir / f"{runtime}-{label}-{mode}"
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "job.npz"
        texts = TextRequest(probes.texts, probes.chats) if text else None
        job = Job(tuple(probes.sequences()), mode, texts, asked, long)
        write_job(path, job)
        with task(f"{runtime}: {label}", job.total * len(job.passes)) as shown:
            result = self.launch(
                runtime,
                model=artifact.path,
                job=path,
                workdir=workdir,
                exact=label == EXACT,
                threads=self.threads,
                lora=artifact.lora,
                vocabulary=self.vocabulary,
                watch=watch_of(runtime, artifact.path, job, shown),
            )
        if result.status != "ok":
            raise run_error(runtime, artifact.path, result)
        for each in job.passes:
            self.fingerprints[f"{runtime}/{label}/{each}"] = dict(result.fingerprint or {})
        return result


def _end_of(log: str) -> str:
    """What the runtime's library said last: the runner's own last line is in its message."""
    said = "\n".join(log.strip().splitlines()[:-1])[-LOG_SHOWN:]
    return f"its log ends: {said}" if said else ""


def run_error(runtime: str, path: Path, result: Any) -> RuntimeUnavailableError:
    """What a run without an answer is called; a runtime that refuses what we wrote has found a defect of ours."""
    if result.status == "refused" and is_unchanged(path):
        return CrashedError(
            f"{runtime} refuses an artifact that qalora-export wrote",
            where=path,
            why="; ".join(part for part in (result.message, _end_of(result.log)) if part),
            fix="this is a defect of qalora-export, not of the runtime: please report it with this message",
        )
    kind = RuntimeUnavailableError if result.status == "missing" else CrashedError
    why = f"signal {result.signal_name}" if result.signal_name else _end_of(result.log)
    return kind(f"{runtime} {result.status}: {result.message}", where=path, why=why)


def watch_of(runtime: str, model: Path, job: Job, shown: Task, counted: str = TOKENS) -> Watch:
    """How long a run may be silent; what it tells goes to `shown`, and its silence to the log.

    counted: how the name of what `shown` counts ends; everything else stands beside it, with counts of its own.
    """
    done = 0

    def on_beat(beat: Beat) -> None:
        nonlocal done
        if not beat.what.endswith(counted):
            shown.update(done, str(beat))
            return
        before = job.total if beat.what.startswith(job.passes[-1]) and len(job.passes) > 1 else 0
        done = before + beat.done
        shown.update(done)

    return Watch(
        patience_for(model, job.longest),
        on_beat=on_beat,
        on_silence=lambda line: logger.warning("%s: %s", runtime, line),
    )
