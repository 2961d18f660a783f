"""verify-parity --pack: everything that the gates will ask of the runtimes, as a folder for a device.

The questions are not listed here. The gates' own code asks them (runtimes.runs, reference.local_run) of a stand-in that
keeps what it was asked, so a pack holds what a run on this machine would have asked, and what it would fall back on
where a runtime crashes. What gates ask only after an answer, the bisect of a failure, cannot be packed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qalora_runtimes.launch import RunnerResult
from qalora_runtimes.packs import PACK, Pack, PackedRequest
from qalora_runtimes.protocol import Job
from qalora_runtimes.taps import TapsResult
from qalora_runtimes.version import __version__ as runtimes_version

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.generation import generation_of
from qalora_export.checkpoint.manifest import parent_of, require_intact, write_manifest
from qalora_export.checkpoint.output import claim_output
from qalora_export.errors import RuntimeUnavailableError
from qalora_export.models.loading import load_tokenizer
from qalora_export.progress import status
from qalora_export.recipe import EvaluateSettings, VerifySettings
from qalora_export.safety import HashedOnce, StrPath, atomic_directory, local_path
from qalora_export.verify.device.questions import Question, about, files_of, run_question, taps_question
from qalora_export.verify.device.wheel import write_wheel
from qalora_export.verify.probes.behaviour import long_sequence, make_behaviour
from qalora_export.verify.probes.probe_set import make_probes
from qalora_export.verify.reference.local_run import LocalProofs
from qalora_export.verify.reference.task import make_task
from qalora_export.verify.runtimes.record import RuntimeRecord, all_runtimes, requested
from qalora_export.verify.runtimes.runs import WHOLE, Runs

ARTIFACTS, REQUESTS, README = "artifacts", "requests", "README.txt"
HOW = """Questions of qalora-export verify-parity to a model on this device. Python 3.11 or newer, {packages}, no torch:

    python3 -m pip install ./{wheel} {packages}
    python3 -m qalora_runtimes .

That writes answers.zip. Take it home and let it be judged there, with the flags that this pack was made with:

    qalora-export verify-parity CHECKPOINT … --answers answers.zip --out parity/
"""


@dataclass(frozen=True)
class PackReport:
    """out: the folder. requests: runs that it asks for when nothing crashes. nbytes: of all its files."""

    out: Path
    runtimes: tuple[str, ...]
    requests: int
    positions: int
    nbytes: int


def pack_verification(
    checkpoint: StrPath,
    out: StrPath,
    settings: VerifySettings | None = None,
    *,
    gguf: StrPath | None = None,
    onnx: StrPath | None = None,
    evaluate: EvaluateSettings | None = None,
    force: bool = False,
) -> PackReport:
    """Write the folder `out` for a device: artifacts, their exact variants, every question, qalora-runtimes as a wheel.

    gguf, onnx: what was exported from `checkpoint`. evaluate: whose first settings.scored questions are asked as well.
    `python -m qalora_runtimes FOLDER` answers there, and
    verify_parity(…, answers=FILE) judges. No reference is computed here and no runtime is started. Raises InputError
    and UnsafeInputError for bad input.
    """
    checkpoint, out, settings = local_path(checkpoint), local_path(out), settings or VerifySettings()
    gguf, onnx = (None if path is None else local_path(path) for path in (gguf, onnx))
    hashed, inputs = HashedOnce(), (checkpoint, gguf, onnx, None if evaluate is None else evaluate.data)
    with claim_output(out, force=force, inputs=inputs), atomic_directory(out, force=force) as folder:
        given = {"gguf": gguf, "onnx": onnx}
        artifacts = requested(settings.runtimes, given)
        model = CanonicalCheckpoint(checkpoint)
        require_intact(checkpoint, "the checkpoint", hash_of=hashed)
        formats = {all_runtimes()[name].format for name in artifacts}
        tokenizer = load_tokenizer(checkpoint)
        probes = make_probes(tokenizer, model.config, settings, formats=formats)
        workdir = folder / "work"
        workdir.mkdir()
        recorder = _Recorder(folder, settings.threads, hashed)
        runs = Runs(probes, model.config["vocab_size"], workdir, settings.threads, recorder.run)
        generation = generation_of(checkpoint, model.config)
        behaviour = make_behaviour(tokenizer, model.config, generation, probes, settings)
        task = None if evaluate is None else make_task(checkpoint, evaluate, settings.scored)
        runs.scored = task.questions if task else ()
        runs.behaviour_asked = lambda: behaviour.request
        runs.long_asked = lambda name: long_sequence(model.config, all_runtimes()[name].format, probes, settings)
        local = LocalProofs(model, probes, settings.threads, workdir, recorder.taps)
        for name, artifact in artifacts.items():
            with status(f"{name}: questions"):
                _ask(all_runtimes()[name], artifact, runs, local, recorder)
        shutil.rmtree(workdir)
        wheel = write_wheel(folder)
        _write(folder, recorder, about(model, probes, settings, given, hashed, task), artifacts, wheel)
        write_manifest(folder, "pack", tensors={}, parents=[parent_of(checkpoint, "checkpoint")], settings={})
        nbytes = sum(file.stat().st_size for _, file in files_of(folder))
    expected = [request for request in recorder.requests if request.unless is None]
    return PackReport(out, tuple(artifacts), len(expected), int(probes.ids.size), nbytes)


def _ask(record: RuntimeRecord, artifact: Path, runs: Runs, local: LocalProofs, recorder: _Recorder) -> None:
    """Everything that a verify.session.Target may ask of its runtime."""
    folder = runs.workdir / record.name
    folder.mkdir()
    shipped, exact = record.shipped(artifact), record.exact(artifact, folder)
    for variant, on_exact in ((shipped, False), (exact, True)):
        recorder.unless = None
        for name, run in runs.rehearse(record.name, variant, exact=on_exact):
            with suppress(RuntimeUnavailableError):  # what the stand-in says to everything
                run()
            if name == WHOLE:
                recorder.unless = recorder.requests[-1].key
    recorder.unless = None
    local.watch(record, shipped)


@dataclass
class _Recorder:
    """Stands in for run_runner and run_taps: keeps what they are asked, and the files, in the pack's folder.

    unless: the request whose crash is the only reason to run those that come now.
    """

    folder: Path
    threads: int
    hashed: HashedOnce
    requests: list[PackedRequest] = field(default_factory=list)
    unless: str | None = None
    _placed: dict[Path, str] = field(default_factory=dict)
    _contents: dict[tuple[tuple[str, str], ...], str] = field(default_factory=dict)

    def run(self, runtime: str, *, model: Path, job: Path, exact: bool, vocabulary: int, **more: Any) -> RunnerResult:
        lora = more.get("lora")
        self._keep(run_question(runtime, model=model, job=job, exact=exact, vocabulary=vocabulary, lora=lora))
        return RunnerResult("missing", "asked of a device")

    def taps(self, runtime: str, *, model: Path, job: Job, names: Any, workdir: Path, **more: Any) -> TapsResult:
        options: dict[str, Any] = {name: more[name] for name in ("lora", "data", "exact") if name in more}
        self._keep(taps_question(runtime, model=model, job=job, names=names, workdir=workdir, **options))
        return TapsResult("ok")  # nothing shown: the other mode is asked as well

    def _keep(self, question: Question) -> None:
        key = question.key(self.hashed)
        if any(request.key == key for request in self.requests):
            return
        place = self.folder / REQUESTS / key
        place.mkdir(parents=True)
        shutil.copyfile(question.job, place / "job.npz")
        names = None
        if question.names is not None:
            (place / "names.json").write_text(json.dumps(question.names), encoding="utf-8")
            names = f"{REQUESTS}/{key}/names.json"
        self.requests.append(
            PackedRequest(
                key=key,
                kind=question.kind,
                runtime=question.runtime,
                model=self._place(question.model),
                job=f"{REQUESTS}/{key}/job.npz",
                exact=question.exact,
                threads=self.threads,
                vocabulary=question.vocabulary,
                lora=None if question.lora is None else self._place(question.lora),
                data=None if question.data is None else self._place(question.data),
                names=names,
                unless=self.unless,
            )
        )

    def _place(self, path: Path) -> str:
        """Where a file or folder is in the pack; equal ones, and what lies in a folder that is there, once."""
        path = path.resolve()
        for root, name in self._placed.items():
            if root == path or root in path.parents:
                return "/".join([name, *path.relative_to(root).parts])
        content = tuple((name, self.hashed(file)) for name, file in files_of(path))
        if content not in self._contents:
            name = f"{ARTIFACTS}/{len(self._contents)}/{path.name}"
            for inner, file in files_of(path):
                target = self.folder / name / inner if inner else self.folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
            self._contents[content] = name
        self._placed[path] = self._contents[content]
        return self._placed[path]


def _write(folder: Path, recorder: _Recorder, whose: dict[str, Any], runtimes: Iterable[str], wheel: str) -> None:
    from qalora_runtimes.launch import RUNNERS

    packages = " ".join(["numpy", *sorted({RUNNERS[name].package for name in runtimes})])
    (folder / README).write_text(HOW.format(packages=packages, wheel=wheel), encoding="utf-8")
    hashed = HashedOnce()
    files = {
        name: {"size": file.stat().st_size, "sha256": hashed(file)} for name, file in files_of(folder) if name != README
    }
    pack = Pack(runtimes_version, whose, files, tuple(recorder.requests))
    (folder / PACK).write_text(json.dumps(pack.as_json(), indent=1) + "\n", encoding="utf-8")
