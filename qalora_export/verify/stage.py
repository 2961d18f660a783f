"""verify-parity: six gates on every requested runtime, one report (DESIGN.md, "Gates")."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.provenance import Link, artifact_links, checkpoint_links
from qalora_export.errors import InputError, RuntimeUnavailableError
from qalora_export.models.loading import load_tokenizer
from qalora_export.progress import status
from qalora_export.recipe import RuntimeName, VerifySettings
from qalora_export.safety import StrPath, atomic_directory, refuse_existing
from qalora_export.verify.bisect.stage import bisect_failures
from qalora_export.verify.gates.artifact import bytes_gate, weights_gate
from qalora_export.verify.gates.logits import Floor, logits_gates, reason
from qalora_export.verify.gates.merge_check import MergeCheck, merge_check
from qalora_export.verify.gates.rule import GATES, Entry, not_run
from qalora_export.verify.gates.text import expected_answers, folder_answers, text_gate
from qalora_export.verify.probes.probe_set import ProbeSet, make_probes
from qalora_export.verify.reference.logits import Reference, reference_logprobs
from qalora_export.verify.reference.noise_floor import NoiseFloor
from qalora_export.verify.report.environment import describe_inputs
from qalora_export.verify.report.html import write_html
from qalora_export.verify.report.junit import write_junit
from qalora_export.verify.report.parity_report import ParityReport, write_report
from qalora_export.verify.runtimes.records import ADAPTERS, RuntimeAdapter
from qalora_export.verify.runtimes.runs import Artifact, Runs

V = TypeVar("V")
logger = logging.getLogger(__name__)
Launch = Callable[..., Any]
SENSITIVITY_BLOCK = 32  # one yardstick for every runtime


@dataclass
class Session:
    """Everything the gates of one run share. chain: the checkpoint's ancestry; links: of the artifacts, as found."""

    checkpoint: CanonicalCheckpoint
    settings: VerifySettings
    probes: ProbeSet
    reference: Reference
    expected_text: dict[str, list[Any]]
    chain: list[Link]
    runs: Runs
    floor: NoiseFloor
    workdir: Path
    merge: MergeCheck
    links: list[Link] = field(default_factory=list)
    floors: dict[str, Floor] = field(default_factory=dict)
    exact: dict[str, Artifact] = field(default_factory=dict)


def verify_parity(
    checkpoint: StrPath,
    out: StrPath,
    settings: VerifySettings | None = None,
    *,
    gguf: StrPath | None = None,
    onnx: StrPath | None = None,
    base: StrPath | None = None,
    force: bool = False,
    bisect: bool = True,
    launch: Launch | None = None,
    taps: Launch | None = None,
) -> ParityReport:
    """Run every gate of every requested runtime and write the report folder `out`, also when parity fails.

    Without settings every runtime that can run a given artifact is requested.
    base: the unadapted base checkpoint whose noise floor bounds the shipped path; without it the base is looked for
    beside the checkpoint by its manifest hash. bisect: look for the first layer and tensor that diverges when a logits
    gate fails. launch, taps: stand in for qalora_runtimes.launch.run_runner and qalora_runtimes.taps.run_taps; a
    stand-in runtime without taps has nothing inside to look at.

    The report's exit_code is 0, 1 or 3. Raises InputError (2) and UnsafeInputError (4) for bad input.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    gguf, onnx, base = (None if path is None else Path(path) for path in (gguf, onnx, base))
    settings = settings or VerifySettings(runtimes=runtimes_for(gguf=gguf, onnx=onnx))
    refuse_existing(out, force=force)
    artifacts = _artifacts(settings, gguf, onnx)
    model = CanonicalCheckpoint(checkpoint)
    with atomic_directory(out, force=force) as folder:
        workdir = folder / "work"
        workdir.mkdir()
        session = _prepare(model, settings, base, workdir, launch)
        report = ParityReport(out, [], [], {})
        for runtime, artifact in artifacts.items():
            _verify_runtime(session, ADAPTERS[runtime], artifact, report)
        if bisect and (taps or launch is None):
            from qalora_runtimes.taps import run_taps

            bisect_failures(session, artifacts, report, taps or run_taps)
        report.links = [*session.links, *session.chain]
        report.facts = describe_inputs(session, artifacts, base)
        shutil.rmtree(workdir)
        for write in (write_report, write_html, write_junit):
            write(report, folder)
    _check_complete(report, settings)
    return report


def runtimes_for(*, gguf: Path | None, onnx: Path | None) -> tuple[RuntimeName, ...]:
    """Every runtime that can run what is given."""
    given = {"gguf": gguf, "onnx": onnx}
    return tuple(cast(RuntimeName, name) for name, adapter in ADAPTERS.items() if given[adapter.format] is not None)


def _artifacts(settings: VerifySettings, gguf: Path | None, onnx: Path | None) -> dict[str, Path]:
    """Requested runtime -> artifact. Raises InputError when a runtime has none."""
    given = {"gguf": gguf, "onnx": onnx}
    artifacts: dict[str, Path] = {}
    for runtime in dict.fromkeys(settings.runtimes):
        path = given[ADAPTERS[runtime].format]
        if path is None or not path.exists():
            kind = ADAPTERS[runtime].format
            raise InputError(
                f"{runtime} is requested but there is no {kind} artifact to run",
                where=path or "",
                fix=f"pass --{kind}, or leave the runtime out",
            )
        artifacts[runtime] = path
    if not artifacts:
        raise InputError("no runtime is requested", fix="pass --gguf or --onnx")
    return artifacts


def _prepare(
    model: CanonicalCheckpoint, settings: VerifySettings, base: Path | None, workdir: Path, launch: Launch | None
) -> Session:
    tokenizer = load_tokenizer(model.path)
    probes = make_probes(tokenizer, model.config, settings)
    logger.info("probe set: %d sequences, %d positions", len(probes.lengths), probes.ids.size)
    with status("PyTorch reference"):
        reference = reference_logprobs(model.path, probes, threads=settings.threads)
    if launch is None:
        from qalora_runtimes.launch import run_runner

        launch = run_runner
    runs = Runs(probes, model.config["vocab_size"], workdir, settings.threads, launch)
    floor = NoiseFloor(model.path, base, probes, reference.logprobs, runs, settings.threads, workdir)
    chain = checkpoint_links(model.path, base=base)
    return Session(
        model,
        settings,
        probes,
        reference,
        folder_answers(model.path, probes),
        chain,
        runs,
        floor,
        workdir,
        merge_check(model, base=base),
    )


def _verify_runtime(session: Session, adapter: RuntimeAdapter, artifact: Path, report: ParityReport) -> None:
    """All six gates of one runtime, in order; a gate that cannot run is an entry too, and the next one is tried."""
    runtime, workdir = adapter.runtime, session.workdir / adapter.runtime
    workdir.mkdir()
    with status(f"{runtime}: bytes and weights"):
        report.entries += [_bytes_entry(session, adapter, artifact), _weights_entry(session, adapter, artifact)]
    shipped = adapter.shipped(artifact)
    with status(f"{runtime}: noise floor"):
        floor = _attempt(lambda: session.floor.of(adapter, shipped))
    if isinstance(floor, Floor):
        session.floors[runtime] = floor
    with status(f"{runtime}: logits"):
        sensitivity = session.floor.simulation(session.checkpoint.path, SENSITIVITY_BLOCK).nmse
        exact = _attempt(lambda: adapter.exact(artifact, workdir))
        if isinstance(exact, Artifact):
            session.exact[runtime] = exact
        logits = logits_gates(
            runtime,
            session.runs,
            session.reference.logprobs,
            exact=exact,
            shipped=shipped,
            floor=floor,
            int8_nmse=sensitivity,
        )
    report.entries += logits.entries
    report.positions |= {(runtime, path): metrics for path, metrics in logits.positions.items()}
    if isinstance(floor, Floor):
        curves = {"noise floor": floor.metrics, "base": floor.base_metrics}
        report.positions |= {(runtime, path): metrics for path, metrics in curves.items() if metrics is not None}
    with status(f"{runtime}: text"):
        report.entries.append(_text_entry(session, adapter, artifact))


def _bytes_entry(session: Session, adapter: RuntimeAdapter, artifact: Path) -> Entry:
    links = artifact_links(artifact, session.checkpoint.path)
    session.links += [link for link in links if link not in session.links]
    contents = adapter.read_back(artifact)
    return bytes_gate(
        adapter.runtime,
        session.checkpoint,
        contents,
        expected=adapter.expected(session.checkpoint, session.reference.frequencies),
        found=adapter.found(artifact, contents),
        links=[*session.chain, *links],
        merge=session.merge,
    )


def _weights_entry(session: Session, adapter: RuntimeAdapter, artifact: Path) -> Entry:
    dequantized = adapter.dequantized(artifact, session.workdir / adapter.runtime / "weights")
    try:
        return weights_gate(adapter.runtime, session.checkpoint, dequantized, by=adapter.dequantizer)
    except RuntimeUnavailableError as error:
        return not_run("G1", adapter.runtime, reason(error))


def _text_entry(session: Session, adapter: RuntimeAdapter, artifact: Path) -> Entry:
    try:
        if adapter.own_tokenizer:
            answers = session.runs.text_answers(adapter.runtime, adapter.shipped(artifact))
        else:
            answers = folder_answers(artifact, session.probes)
    except RuntimeUnavailableError as error:
        return not_run("G5", adapter.runtime, reason(error))
    expected = expected_answers(session.expected_text, adapter.habits)
    return text_gate(adapter.runtime, session.probes, expected, answers)


def _attempt(step: Callable[[], V]) -> V | RuntimeUnavailableError:
    """The step's value, or the runtime's failure; bad and unsafe input still end the run."""
    try:
        return step()
    except RuntimeUnavailableError as error:
        return error


def _check_complete(report: ParityReport, settings: VerifySettings) -> None:
    found = [(entry.gate, entry.runtime) for entry in report.entries]
    wanted = [(gate, runtime) for runtime in dict.fromkeys(settings.runtimes) for gate in GATES]
    assert found == wanted, f"gates {found} are not {wanted}"
