"""What identifies a question to a runtime: the same when it is packed and when its answer is looked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalora_runtimes.packs import RUN, TAPS, request_key
from qalora_runtimes.protocol import Job, write_job

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.manifest import MANIFEST
from qalora_export.formats.gguf.split import adapter_path
from qalora_export.installed import code_version
from qalora_export.recipe import VerifySettings
from qalora_export.safety import HashedOnce, HashFile, sha256_bytes, sha256_file
from qalora_export.verify.identity import combined, identities
from qalora_export.verify.probes.probe_set import ProbeSet
from qalora_export.verify.reference.task import Task

# What the questions follow from; bounds are the judge's own, and threads do not belong to a question.
ASKED_BY = ("sequences", "positions", "max_length", "long_length", "seed")


@dataclass(frozen=True)
class Question:
    """One call of launch.run_runner or taps.run_taps. job: its file. names: passes of values to read, for taps."""

    kind: str
    runtime: str
    model: Path
    job: Path
    exact: bool
    vocabulary: int | None = None
    lora: Path | None = None
    data: Path | None = None
    names: tuple[tuple[str, ...], ...] | None = None

    def key(self, hash_of: HashFile) -> str:
        """sha256 of all that the answer depends on. hash_of: of a file."""
        asked = {
            "kind": self.kind,
            "runtime": self.runtime,
            "exact": self.exact,
            "vocabulary": self.vocabulary,
            "job": sha256_file(self.job),
            "names": self.names,
        }
        roles = {"model": self.model, "lora": self.lora, "data": self.data}
        given = {role: path for role, path in roles.items() if path is not None}
        files = [(f"{role}/{name}", hash_of(file)) for role, path in given.items() for name, file in files_of(path)]
        return str(request_key(asked, files))


def run_question(runtime: str, *, model: Path, job: Path, exact: bool, vocabulary: int, lora: Path | None) -> Question:
    return Question(RUN, runtime, model, job, exact, vocabulary, lora)


def taps_question(
    runtime: str,
    *,
    model: Path,
    job: Job,
    names: Sequence[Sequence[str]],
    workdir: Path,
    exact: bool = False,
    lora: Path | None = None,
    data: Path | None = None,
) -> Question:
    """The job is written into `workdir`, as run_taps does."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_job(workdir / "job.npz", job)
    passes = tuple(tuple(some) for some in names)
    return Question(TAPS, runtime, model, workdir / "job.npz", exact, None, lora, data, passes)


def files_of(path: Path) -> Iterator[tuple[str, Path]]:
    """(name, file) of a file, or of every file in a folder, in the order of their names."""
    if not path.is_dir():
        yield "", path
        return
    for file in sorted(path.rglob("*")):
        if file.is_file():
            yield file.relative_to(path).as_posix(), file


def about(
    model: CanonicalCheckpoint,
    probes: ProbeSet,
    settings: VerifySettings,
    given: Mapping[str, Path | None],
    hashed: HashedOnce,
    task: Task | None,
) -> dict[str, Any]:
    """Whose pack this is. given: artifacts by format. task: of which questions are asked as well."""
    artifacts = {fmt: _artifact_sha256(path, hashed) for fmt, path in given.items() if path is not None}
    return {
        "checkpoint": {"name": model.path.name, "sha256": _identity_of(model.path, hashed)},
        "artifacts": artifacts,
        "probe_sha256": probes.sha256,
        "code": code_version(),
        "task_sha256": None if task is None else sha256_bytes(repr(task.questions).encode()),
        "settings": {name: getattr(settings, name) for name in ASKED_BY},
    }


def _identity_of(folder: Path, hashed: HashedOnce) -> str:
    """A checkpoint's manifest names every byte of it; without one, all files."""
    manifest = folder / MANIFEST
    return hashed(manifest) if manifest.is_file() else _listing(folder, hashed)


def _artifact_sha256(path: Path, hashed: HashedOnce) -> str:
    adapter = adapter_path(path)
    roots = [path, *([adapter] if adapter.is_file() else [])]
    return sha256_bytes("".join(_listing(root, hashed) for root in roots).encode())


def _listing(root: Path, hashed: HashedOnce) -> str:
    files = identities(root, hashed=hashed).items()
    named = ((path.relative_to(root).as_posix() if root.is_dir() else "", identity) for path, identity in files)
    return sha256_bytes(combined(named).encode())
