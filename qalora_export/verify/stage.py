"""verify-parity: every gate on every requested runtime, one report."""

from __future__ import annotations

import logging
import shlex
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qalora_runtimes.process import patience_for

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.manifest import parent_of, require_intact, write_manifest
from qalora_export.checkpoint.output import claim_output
from qalora_export.checkpoint.provenance import checkpoint_links
from qalora_export.errors import InputError, RuntimeUnavailableError
from qalora_export.models.families.family import Format
from qalora_export.models.loading import load_tokenizer, tokenizers_loaded_once
from qalora_export.progress import status, track
from qalora_export.recipe import EvaluateSettings, VerifySettings
from qalora_export.safety import HashedOnce, StrPath, atomic_directory, local_path
from qalora_export.verify.bisect.search import Bisection, bisect_failures, explain
from qalora_export.verify.device.answers import DeviceAnswers
from qalora_export.verify.device.questions import about
from qalora_export.verify.device.server import RUNTIME, LlamaServer
from qalora_export.verify.gates.g0_bytes import GATE as BYTES
from qalora_export.verify.gates.g0_bytes import still_the_same
from qalora_export.verify.gates.registry import Measured, registered
from qalora_export.verify.identity import identities
from qalora_export.verify.metrics import following_ids, position_metrics
from qalora_export.verify.probes.probe_set import make_probes
from qalora_export.verify.reference.ancestry import ancestry
from qalora_export.verify.reference.lineage import lineage
from qalora_export.verify.reference.local_run import LocalProofs
from qalora_export.verify.reference.logits import reference_logprobs, simulated_int8_logprobs
from qalora_export.verify.reference.merge_check import merge_check
from qalora_export.verify.reference.task import make_task
from qalora_export.verify.reference.text import folder_answers
from qalora_export.verify.report.costs import cost_table
from qalora_export.verify.report.environment import describe_inputs
from qalora_export.verify.report.html import write_html
from qalora_export.verify.report.junit import write_junit
from qalora_export.verify.report.parity_report import ParityReport, withdraw, write_report
from qalora_export.verify.rule import Entry
from qalora_export.verify.runtimes.record import all_runtimes, requested
from qalora_export.verify.runtimes.runs import Runs
from qalora_export.verify.session import Session
from qalora_export.verify.store import kept_in, opened
from qalora_export.verify.target import Target

Launch = Callable[..., Any]
logger = logging.getLogger(__name__)


def verify_parity(
    checkpoint: StrPath,
    out: StrPath,
    settings: VerifySettings | None = None,
    *,
    gguf: StrPath | None = None,
    onnx: StrPath | None = None,
    base: StrPath | None = None,
    adapter: StrPath | None = None,
    original: StrPath | None = None,
    answers: StrPath | None = None,
    server: str | None = None,
    api_key_file: StrPath | None = None,
    evaluate: EvaluateSettings | None = None,
    force: bool = False,
    bisect: bool = True,
    cache: bool = True,
    launch: Launch | None = None,
    taps: Launch | None = None,
) -> ParityReport:
    """Run every gate of every requested runtime and write the report folder `out`, also when parity fails.

    gguf, onnx: what was exported from `checkpoint`; without settings.runtimes every runtime that can run what is given
    is verified. base, adapter: the base checkpoint and the adapter that were merged into this one; what is not given is
    looked for beside the checkpoint by its manifest hash. original: the model that the base was quantized from, found
    likewise; it is compared, and the first row of the table of costs. answers: a device's, to what pack_verification
    asked with the same settings; no runtime runs here but for gate G1. server: the address of a llama-server that runs
    the file, api_key_file: the file with its key; what its API does not give is "not run". evaluate: the first
    settings.scored of these questions are put to every model and runtime, for the task score in that table. bisect:
    look for the first layer and tensor that diverges when a logits gate fails. cache: keep what PyTorch computes for a
    checkpoint for later runs on the same machine (verify.store). launch, taps: stand in for
    qalora_runtimes.launch.run_runner and
    qalora_runtimes.taps.run_taps; a stand-in runtime without taps has nothing inside to look at.

    With `force` an old report's verdict is withdrawn first: a run that fails leaves none.
    Nothing is printed: the report's exit_code is 0, 1 or 3, and cli.parity_table.print_report shows it. Raises
    InputError (2) and UnsafeInputError (4) for bad input.
    """
    checkpoint, out, settings = local_path(checkpoint), local_path(out), settings or VerifySettings()
    paths = (gguf, onnx, base, adapter, original, answers, api_key_file)
    gguf, onnx, base, adapter, original, answers, api_key_file = (
        None if path is None else local_path(path) for path in paths
    )
    if answers is not None and server is not None:
        raise InputError("answers and a server are given", where="server", fix="give one of them")
    data = None if evaluate is None else evaluate.data
    inputs = (checkpoint, gguf, onnx, base, adapter, original, answers, settings.prompts, data)
    hashed = HashedOnce()
    store = opened(hashed) if cache else None
    with (
        claim_output(out, force=force, inputs=inputs),
        atomic_directory(out, force=force) as folder,
        kept_in(store),
        tokenizers_loaded_once(),
    ):
        withdraw(out)
        asked = settings.runtimes or (None if server is None else (RUNTIME,))
        artifacts = requested(asked, {"gguf": gguf, "onnx": onnx})
        model = CanonicalCheckpoint(checkpoint)
        require_intact(checkpoint, "the checkpoint", hash_of=hashed)
        if base is not None:
            require_intact(base, "the base", hash_of=hashed)
        recorded = None if answers is None else DeviceAnswers(answers, hashed)
        device = recorded if server is None else LlamaServer(server, api_key_file)
        line = _Line(model, base, adapter, original, hashed, recorded, {"gguf": gguf, "onnx": onnx}, evaluate)
        workdir = folder / "work"
        workdir.mkdir()
        if device is not None:
            launch, taps = device.run, device.taps
        if launch is None and taps is None:
            from qalora_runtimes.taps import run_taps

            taps = run_taps
        formats = {all_runtimes()[name].format for name in artifacts}
        session = _prepare(line, settings, workdir, launch, taps, formats)
        session.kept = store.answered if store else []
        targets = [Target(session, all_runtimes()[name], artifact) for name, artifact in artifacts.items()]
        with status("hashing the files"):
            session.files = identities(*_roots(targets), hashed=hashed)
        work = [(gate, target) for target in targets for gate in registered()]
        entries = [_measure(gate, target) for gate, target in track(work, "verify-parity, gates")]
        positions = {(target.name, path): found for target in targets for path, found in target.positions.items()}
        bisections = dict[str, Bisection]()
        if bisect and taps is not None:
            bisections = bisect_failures(session, targets, entries, positions, taps)
            for bisection in bisections.values():
                entries = explain(entries, bisection)
        costs = cost_table(session, targets)
        entries = _still_the_same(entries, targets)
        links, facts = [*session.links, *session.chain], describe_inputs(session, targets, base)
        facts["device"] = None if device is None else device.described()
        facts["command"] += f" --answers {shlex.quote(answers.name)}" if answers else ""
        facts["command"] += f" --server {shlex.quote(server)}" if server else ""
        report = ParityReport(out, entries, links, facts, positions, bisections, costs)
        shutil.rmtree(workdir)
        for write in (write_report, write_html, write_junit):
            write(report, folder)
        write_manifest(folder, "report", tensors={}, parents=[parent_of(checkpoint, "checkpoint")], settings={})
    return report


def _roots(targets: list[Target]) -> list[Path]:
    return list(dict.fromkeys(root for target in targets for root in target.roots))


def _still_the_same(entries: list[Entry], targets: list[Target]) -> list[Entry]:
    """The same entries; G0 of a runtime whose files changed during the run has failed."""
    with status("hashing the files again"):
        now = identities(*_roots(targets), hashed=HashedOnce())
    by_name = {target.name: target for target in targets}
    return [
        still_the_same(entry, by_name[entry.runtime], now) if entry.gate == BYTES.id else entry for entry in entries
    ]


@dataclass(frozen=True)
class _Line:
    """The checkpoint, what was given of those that it was made from, artifacts by format, a device's answers."""

    model: CanonicalCheckpoint
    base: Path | None
    adapter: Path | None
    original: Path | None
    hashed: HashedOnce
    device: DeviceAnswers | None
    artifacts: Mapping[str, Path | None]
    evaluate: EvaluateSettings | None


def _prepare(
    line: _Line,
    settings: VerifySettings,
    workdir: Path,
    launch: Launch | None,
    taps: Launch | None,
    formats: Collection[Format],
) -> Session:
    model, base, adapter, original, hashed = line.model, line.base, line.adapter, line.original, line.hashed
    _check_patience()
    tokenizer = load_tokenizer(model.path)
    probes = make_probes(tokenizer, model.config, settings, formats=formats)
    logger.info("probe set: %d sequences, %d positions", len(probes.lengths), probes.ids.size)
    task = None if line.evaluate is None else make_task(model.path, line.evaluate, settings.scored)
    if line.device is not None:
        line.device.require(about(model, probes, settings, line.artifacts, hashed, task))
    began = time.perf_counter()
    with status("PyTorch reference"):
        reference = reference_logprobs(model.path, probes, threads=settings.threads)
    with status("int8 activations in PyTorch"):
        int8 = simulated_int8_logprobs(model.path, probes, threads=settings.threads)
    with status("original and base in PyTorch"):
        members = lineage(
            model.path,
            reference.logprobs,
            probes,
            threads=settings.threads,
            base=base,
            original=original,
            task=task,
            hash_of=hashed,
        )
    seconds = time.perf_counter() - began
    from qalora_runtimes.launch import run_runner

    merge = merge_check(model, base=base, adapter=adapter)
    runs = Runs(probes, model.config["vocab_size"], workdir, settings.threads, launch or run_runner)
    return Session(
        checkpoint=model,
        settings=settings,
        probes=probes,
        reference=reference,
        simulation=position_metrics(reference.logprobs, int8, following_ids(probes.ids, probes.lengths)),
        lineage=members,
        expected_text=folder_answers(model.path, probes),
        chain=checkpoint_links(model.path, base=base, adapter=adapter, original=original, hash_of=hashed),
        merge=merge,
        ancestry=ancestry(
            model.path, merge, base=base, original=original, accepted=settings.without_parents, hash_of=hashed
        ),
        runs=runs,
        local=LocalProofs(model, probes, settings.threads, workdir, taps),
        workdir=workdir,
        task=task,
        hashed=hashed,
        reference_seconds=seconds,
    )


def _check_patience() -> None:
    try:
        patience_for(Path(), 0)
    except ValueError as error:
        raise InputError(str(error), where="environment") from error


def _measure(measured: Measured, target: Target) -> Entry:
    """One gate of one runtime; what cannot run is an entry too. Bad and unsafe input still end the run."""
    gate, began = measured.gate, time.perf_counter()
    with status(f"{target.name}: {gate.title}"):
        try:
            entry = measured.measure(target)
        except RuntimeUnavailableError as error:
            entry = gate.not_run(target.name, error.reason)
    assert (entry.gate, entry.runtime) == (gate.id, target.name), f"{gate.id} answered for {entry.gate}"
    return replace(entry, seconds=time.perf_counter() - began)
