"""verify-parity for a plain model and a file of any tool: each part in its order, one report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qalora_runtimes.launch import run_runner

from qalora_export.checkpoint.canonical import is_canonical
from qalora_export.checkpoint.generation import generation_config
from qalora_export.checkpoint.manifest import write_manifest
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.checkpoint.output import claim_output
from qalora_export.errors import InputError, RuntimeUnavailableError
from qalora_export.models.families import family_of
from qalora_export.models.loading import load_tokenizer
from qalora_export.models.sources import locate
from qalora_export.progress import status
from qalora_export.recipe import VerifySettings
from qalora_export.safety import HashedOnce, StrPath, atomic_directory, local_path
from qalora_export.verify.foreign.diagnosis import Part
from qalora_export.verify.foreign.ends import ends_part
from qalora_export.verify.foreign.genai_words import explained
from qalora_export.verify.foreign.graph import (
    LogProbs,
    costs,
    graph_part,
    graph_refused,
    kernels_part,
    kernels_refused,
)
from qalora_export.verify.foreign.metadata import complete_config
from qalora_export.verify.foreign.model import OwnNumbers
from qalora_export.verify.foreign.report import Diagnosis, write_diagnosis
from qalora_export.verify.foreign.sides import GENAI, GgufSide, OnnxSide, Side
from qalora_export.verify.foreign.text import template_part, tokenizer_part, without_bos
from qalora_export.verify.foreign.weights import Finding, compared, weights_part
from qalora_export.verify.identity import changes, identities
from qalora_export.verify.probes.probe_set import ProbeSet, make_probes
from qalora_export.verify.reference.logits import Reference, reference_logprobs
from qalora_export.verify.reference.text import folder_answers
from qalora_export.verify.report.parity_report import withdraw
from qalora_export.verify.runtimes.facts import expected_text_facts
from qalora_export.verify.runtimes.onnxruntime_genai import expected_generation_ends
from qalora_export.verify.runtimes.record import Artifact, requested
from qalora_export.verify.runtimes.runs import Mode, Runs
from qalora_export.verify.store import kept_in, opened

MODES: tuple[Mode, ...] = ("prefill", "decode")
NAMED = 3  # of many of a kind


@dataclass
class Source:
    """The model that the artifact claims to be. config: complete; raw: config.json as it is."""

    folder: ModelFolder
    config: dict[str, Any]
    tokenizer: Any
    probes: ProbeSet
    reference: Reference
    text: dict[str, Any]
    threads: int
    workdir: Path
    parts: list[Part] = field(default_factory=list)

    @property
    def heads(self) -> dict[str, int]:
        config = self.config
        return {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}


def diagnose(
    model: StrPath,
    out: StrPath,
    settings: VerifySettings | None = None,
    *,
    gguf: StrPath | None = None,
    onnx: StrPath | None = None,
    revision: str | None = None,
    force: bool = False,
    cache: bool = True,
    launch: Callable[..., Any] | None = None,
) -> Diagnosis:
    """Find out what is broken in a file that any tool made of a plain Transformers model; write the report folder.

    model: a folder or hub id, in 16 or 32 bits. gguf or onnx: in any quantization; it runs in every one of
    settings.runtimes, by default in llama.cpp, or in ONNX Runtime GenAI (ONNX Runtime where it lacks that one's
    config). launch: stands in for qalora_runtimes.launch.run_runner. Raises InputError (2) and UnsafeInputError (4) for
    input that cannot be read at all; what a runtime does is a finding. Nothing is printed.
    """
    settings, out = settings or VerifySettings(), local_path(out)
    given = [path for path in (gguf, onnx) if path is not None]
    if len(given) != 1:
        raise InputError("one artifact is looked at in one run", fix="pass --gguf FILE or --onnx FOLDER")
    artifact = local_path(given[0])
    located = locate(model, revision)
    hashed = HashedOnce()
    store = opened(hashed) if cache else None
    with claim_output(out, force=force, inputs=(located.path, artifact)), atomic_directory(out, force=force) as folder:
        withdraw(out)
        with kept_in(store):
            workdir = folder / "work"
            workdir.mkdir()
            before = identities(located.path, artifact, hashed=hashed)
            folder_of, config = _model(located.path)
            names = None
            if settings.runtimes is not None:
                names = list(requested(settings.runtimes, {"gguf" if gguf is not None else "onnx": artifact}))
            sides = _sides(artifact, config, set(folder_of.names()), names, is_gguf=gguf is not None)
            source = _source(folder_of, config, sides[0].context, settings, workdir)
            findings, figures = _parts(source, sides, launch or run_runner)
            changed = changes(before, identities(located.path, artifact, hashed=HashedOnce()))
        if changed:
            raise InputError("a file changed while it was looked at", where=changed[0], fix="run the command again")
        shutil.rmtree(workdir)
        diagnosis = Diagnosis(
            out=out,
            model=located.hub_id or located.path.name,
            artifact=artifact.name,
            files={path.name: before[path].sha256 for path in before if path == artifact or artifact in path.parents},
            parts=source.parts,
            tensors=findings,
            figures=figures,
        )
        write_diagnosis(diagnosis, folder)
        write_manifest(folder, "report", tensors={}, parents=[], settings={})
    return diagnosis


def _sides(
    artifact: Path, config: Mapping[str, Any], source: set[str], runtimes: list[str] | None, *, is_gguf: bool
) -> list[Side]:
    """One for each runtime; None: the artifact's own."""
    if is_gguf:
        return [GgufSide(artifact, config, source)]
    if runtimes is None:
        return [OnnxSide(artifact, config, source)]
    return [OnnxSide(artifact, config, source, name) for name in runtimes]


def _model(path: Path) -> tuple[ModelFolder, dict[str, Any]]:
    """The folder and its complete config. Raises InputError for a model that is quantized itself, or of no family."""
    if is_canonical(path) or ModelFolder(path).config.get("quantization_config") is not None:
        raise InputError(
            "the model is quantized itself",
            where=path,
            why="what the file lost can only be seen beside the numbers it was made from",
            fix="give the folder of the 16-bit model",
        )
    config = complete_config(path)
    family_of(config)
    return ModelFolder(path), config


def _source(
    folder: ModelFolder, config: dict[str, Any], context: int | None, settings: VerifySettings, workdir: Path
) -> Source:
    """context: tokens after which the artifact ends; the probes keep within it, and within the model's own."""
    tokenizer = load_tokenizer(folder.path)
    longest = min(config["max_position_embeddings"], context or config["max_position_embeddings"])
    probes = make_probes(tokenizer, {**config, "max_position_embeddings": longest}, settings)
    with status("PyTorch reference"):
        reference = reference_logprobs(folder.path, probes, threads=settings.threads)
    text = folder_answers(folder.path, probes)
    return Source(folder, config, tokenizer, probes, reference, text, settings.threads, workdir)


def _parts(source: Source, sides: list[Side], launch: Callable[..., Any]) -> tuple[list[Finding], dict[str, Any]]:
    """Every part of an artifact in its runtimes: (tensors, what it costs)."""
    first = sides[0]
    artifact, bound, rounding = first.artifact, first.bound, first.rounding
    findings = compared(artifact, source.folder, source.heads)
    own = OwnNumbers(
        artifact,
        source.config,
        source.probes,
        source.workdir,
        threads=source.threads,
        bound=bound,
        rounding=rounding,
    )
    numbers = _own_numbers(own)
    source.parts.append(weights_part(source.folder, source.reference.logprobs, findings, own, numbers))
    figures = dict[str, Any]()
    for side in sides:
        figures |= _in_runtime(source, side, own, numbers, launch)
    return findings, figures


def _in_runtime(
    source: Source, side: Side, own: OwnNumbers, numbers: LogProbs | None, launch: Callable[..., Any]
) -> dict[str, Any]:
    """Every part but the weights, in one runtime; what it costs there."""
    name, misnamed = side.runtime, side.mended(source.workdir)
    runs = Runs(source.probes, source.config["vocab_size"], source.workdir, source.threads, launch)
    if reason := side.cannot_run():
        source.parts += [Part("graph", name, "broken", reason), *_text(source, side, runs)]
        source.parts.append(Part("kernels", name, "not run", reason))
        return costs(own.probes, source.reference.logprobs, name, numbers, {})
    paths, refusal = _paths(source, side, runs)
    if "exact" in paths:
        with _timed(source):
            differences = side.differences(source.config, source.reference.frequencies)
            found = graph_part(name, own, paths["exact"], differences, numbers)
            found = found.behind(misnamed, "in a copy that has this name") if misnamed else found
            if steps := side.steps_of_no_size():
                more = f" and {len(steps) - NAMED} more" if len(steps) > NAMED else ""
                said = f"activations are rounded in steps of no size: {', '.join(steps[:NAMED])}{more}"
                found = found.behind(said, "without rounding")
            source.parts.append(found)
    elif refusal is not None:
        source.parts.append(graph_refused(name, refusal))
    source.parts += _text(source, side, runs)
    if refusal is not None:
        source.parts.append(kernels_refused(name, refusal, graph_runs="exact" in paths, is_half=side.is_half))
    else:
        with _timed(source):
            source.parts.append(kernels_part(name, own, paths, numbers))
    return costs(own.probes, source.reference.logprobs, name, numbers, paths)


@contextmanager
def _timed(source: Source) -> Iterator[None]:
    began = time.perf_counter()
    yield
    source.parts[-1] = replace(source.parts[-1], seconds=time.perf_counter() - began)


def _own_numbers(own: OwnNumbers) -> LogProbs | None:
    try:
        return own.logprobs()
    except InputError:
        return None


def _paths(source: Source, side: Side, runs: Runs) -> tuple[dict[str, LogProbs], RuntimeUnavailableError | None]:
    """Log-probabilities of its numbers without rounding, and of the artifact as it is; why one is missing."""
    found = dict[str, LogProbs]()
    try:
        with side.exact(source.workdir) as exact:
            answers = {mode: runs.logprobs(side.runtime, exact, mode, exact=True) for mode in MODES}
        found |= {"exact": answers["prefill"], "decode": answers["decode"]}
        with side.ranges(source.workdir) as rounding:
            if rounding is not None:
                found["ranges"] = runs.logprobs(side.runtime, rounding, "prefill", exact=True)
        found["shipped"] = runs.logprobs(side.runtime, Artifact(side.artifact.path), "prefill", exact=False)
    except RuntimeUnavailableError as error:
        return found, error
    return found, None


def _text(source: Source, side: Side, runs: Runs) -> list[Part]:
    """Tokenizer, chat template, end tokens."""
    if reason := side.no_tokenizer():
        return [
            *(Part(part, side.runtime, "not run", reason) for part in ("tokenizer", "template")),
            _ends(source, side),
        ]
    habits, name, folder = side.habits, side.runtime, source.folder.path
    try:
        answers = side.text_answers(runs, source.probes)
    except RuntimeUnavailableError as error:
        return [Part(part, name, "not run", error.reason) for part in ("tokenizer", "template", "ends")]
    bos, facts = source.text["bos"] if habits.cuts_bos else "", side.facts()
    answers, tables = without_bos(answers, bos), (expected_text_facts(folder), facts)
    templates = (source.tokenizer.chat_template, facts.get("chat template"))
    tokenizer = tokenizer_part(name, source.probes, source.text, answers, habits, tables)
    if name == GENAI:
        tokenizer = explained(
            tokenizer,
            side.artifact.path,
            source.workdir / "with-words",
            lambda copy: without_bos(runs.text_answers(name, Artifact(copy)), bos),
            lambda found: tokenizer_part(name, source.probes, source.text, found, habits, tables),
        )
    template = template_part(name, source.probes, source.text, answers, habits, templates)
    return [tokenizer, template, _ends(source, side)]


def _ends(source: Source, side: Side) -> Part:
    if not side.says_ends:
        return Part("ends", side.runtime, "not run", "the folder says nothing about generation")
    folder = source.folder.path
    try:
        found = side.ends(source.workdir / "stops")
    except RuntimeUnavailableError as error:
        return Part("ends", side.runtime, "not run", error.reason)
    wanted = expected_generation_ends(folder, source.config)
    sampling = side.sampling(generation_config(folder, source.config))
    return ends_part(side.runtime, wanted, found, source.tokenizer, sampling)
