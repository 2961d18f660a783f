"""The models that the verified one was made from, at the same questions: the original and the quantized base.

What quantization and training changed is no fault of an export, and no bound is on it; a report that says what ships
must say it all the same, from the beginning. Each model is found by what the manifests recorded of it, or given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.manifest import has_manifest, parent_of, read_manifest
from qalora_export.checkpoint.model_folder import ModelFolder
from qalora_export.checkpoint.provenance import kind_of, parent_folder
from qalora_export.errors import InputError
from qalora_export.safety import HashFile, sha256_file
from qalora_export.verify.metrics import PositionMetrics, following_ids, next_logprobs, position_metrics
from qalora_export.verify.probes.probe_set import ProbeSet
from qalora_export.verify.reference.logits import reference_logprobs
from qalora_export.verify.reference.task import Score, Task, model_score

Role = Literal["original", "base", "checkpoint"]
SCORE = "score.{}.json"  # what `run` writes beside the checkpoints


@dataclass(frozen=True, slots=True)
class Member:
    """One model of the line. note: why it or a part of it is not at hand.

    next: its log-probability of the token that follows, float64 (positions,), NaN at the end of a sequence; None where
    the model is not at hand. change: against the member before it; None where either is not.
    """

    role: Role
    name: str
    note: str = ""
    next: NDArray[np.float64] | None = None
    change: PositionMetrics | None = None
    score: Score | None = None


@dataclass(frozen=True, slots=True)
class _Found:
    role: Role
    name: str
    path: Path | None
    note: str = ""


def lineage(
    checkpoint: Path,
    reference: NDArray[np.float32],
    probes: ProbeSet,
    *,
    threads: int,
    base: Path | None = None,
    original: Path | None = None,
    task: Task | None = None,
    hash_of: HashFile = sha256_file,
) -> tuple[Member, ...]:
    """original, base (where the checkpoint is not one itself) and the checkpoint, whose own answers are `reference`.

    base, original: stand for those that the manifests name. task: what each of them is asked for its score; without one
    a score is what `run` left beside the checkpoint. Raises InputError for an original that is not the one that the
    base was made from.
    """
    following = following_ids(probes.ids, probes.lengths)
    members, before = list[Member](), None
    for found in _line(checkpoint, base, original, hash_of):
        logprobs, note = None, found.note
        if found.role == "checkpoint":
            logprobs = reference
        elif found.path is not None:
            logprobs = _answers(found.path, probes, threads, reference.shape)
        members.append(
            Member(
                found.role,
                found.name,
                note,
                None if logprobs is None else next_logprobs(logprobs, following),
                None if logprobs is None or before is None else position_metrics(before, logprobs, following),
                _score(found, checkpoint, task, threads, hash_of),
            )
        )
        before = logprobs
    return tuple(members)


def _line(checkpoint: Path, base: Path | None, original: Path | None, hash_of: HashFile) -> Iterator[_Found]:
    """The original first."""
    is_base = kind_of(checkpoint) == "base"
    base = checkpoint if is_base else base or parent_folder(checkpoint, "base", hash_of=hash_of)
    yield _original(base, original, hash_of)
    if not is_base:
        yield _Found("base", *_named(base, "it is not beside the checkpoint; --base gives it"))
    yield _Found("checkpoint", checkpoint.name, checkpoint)


def _named(path: Path | None, why: str) -> tuple[str, Path | None, str]:
    return ("", None, why) if path is None else (path.name, path, "")


def _original(base: Path | None, given: Path | None, hash_of: HashFile) -> _Found:
    recorded = _source_of(base)
    if given is not None and recorded is not None:
        if parent_of(given, "source", hash_of=hash_of).sha256 != recorded["sha256"]:
            raise InputError(
                "this is not the model that the base was made from",
                where=given,
                why=f"its files are not those of {recorded['name']} in the base's manifest",
                fix="give the folder that `quantize` read, or leave --original out",
            )
    elif given is None and base is not None and recorded is not None:
        given = parent_folder(base, "source", hash_of=hash_of)
    name = recorded["name"] if recorded else given.name if given else ""
    if given is None:
        return _Found("original", name, None, "it is not beside the base; --original gives it")
    if given.is_file() or "quantization_config" in ModelFolder(given).config:
        return _Found("original", name, None, "it is quantized already: the base took its numbers")
    return _Found("original", name, given, "" if recorded else "no manifest says that the base was made from it")


def _source_of(base: Path | None) -> dict[str, Any] | None:
    """The parent "source" in the manifest of a base."""
    if base is None or not has_manifest(base):
        return None
    return next((parent for parent in read_manifest(base)["parents"] if parent.get("role") == "source"), None)


def _answers(path: Path, probes: ProbeSet, threads: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    logprobs = reference_logprobs(path, probes, threads=threads).logprobs
    if logprobs.shape != shape:
        raise InputError(
            f"the model has a vocabulary of {logprobs.shape[1]}, the checkpoint one of {shape[1]}",
            where=path,
            fix="give the model that this checkpoint was made from",
        )
    return logprobs


def _score(found: _Found, checkpoint: Path, task: Task | None, threads: int, hash_of: HashFile) -> Score | None:
    if found.path is None:
        return None
    written = score_file(checkpoint, "original" if found.role == "original" else found.path.name)
    return model_score(found.path, written, task, threads=threads, hash_of=hash_of)


def score_file(checkpoint: Path, model: str) -> Path:
    """Where `run` leaves the score of a model of that name."""
    return checkpoint.resolve().parent / SCORE.format(model.removesuffix(".qalora"))
