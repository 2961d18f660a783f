"""manifest.json: the commit mark and the provenance chain base → adapter → merged → artifact.

It is the last file written. It names every file of its folder with size and sha256, every tensor with dtype and shape
(those of a checkpoint with sha256 too), the settings that made them, and the sha256 of each parent's manifest. It holds
no time and no absolute path, so equal inputs and settings give equal bytes. That of a single file lies beside it:
`<out>.manifest.json`.
"""

import contextlib
import functools
import json
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from qalora_export.checkpoint.model_folder import COMPANIONS
from qalora_export.errors import InputError, QaloraError, UnsafeInputError
from qalora_export.progress import track
from qalora_export.safety import HashFile, inside, read_json, sha256_bytes, sha256_file
from qalora_export.version import __version__

MANIFEST = "manifest.json"
FORMAT = "qalora-manifest/1"
FileKind = Literal["base", "adapter", "merged", "gguf", "onnx", "report", "pack"]
# What a stage or a runtime reads from a model folder, by the names that readers look for; notes and pictures are not.
STEERING_SUFFIXES = {".json", ".safetensors", ".jinja", ".model", ".tiktoken", ".onnx", ".onnx_data", ".data"}
STEERING_NAMES = {*COMPANIONS, "vocab.txt"}
LARGE = 2**24  # bytes of a file that is checked beside the work that reads it
SHOW_PROGRESS = 2**30  # bytes; hashing less takes a moment


@dataclass(frozen=True, slots=True)
class Parent:
    """What this artifact was made from: role ("source", "base", "adapter", "checkpoint"), name, manifest sha256."""

    role: str
    name: str
    sha256: str


def parent_of(folder: Path, role: str, *, hash_of: HashFile = sha256_file) -> Parent:
    """Reference to a stage output (by its manifest), to a plain folder (by its config, weights and tokenizer) or to a
    file (by its bytes).

    A "source" is never a stage output: whatever manifest lies in it says nothing about the files that are read.
    """
    if folder.is_file():
        return Parent(role, folder.name, hash_of(folder))
    if role != "source" and is_ours(folder / MANIFEST):
        return Parent(role, folder.name, hash_of(folder / MANIFEST))
    names = steering_files(folder)
    large = sum((folder / name).stat().st_size for name in names) >= SHOW_PROGRESS
    shown = track(names, f"hash {folder.name}") if large else names
    listing = "".join(f"{name} {hash_of(folder / name)}\n" for name in shown)
    return Parent(role, folder.name, sha256_bytes(listing.encode()))


def steering_files(folder: Path) -> list[str]:
    """Names, relative to the folder and sorted, of everything in it that can change what a model computes or says."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    shown = (path for path in files if not any(part.startswith(".") for part in path.parts))
    return sorted(p.as_posix() for p in shown if p.suffix in STEERING_SUFFIXES or p.name in STEERING_NAMES)


def write_manifest(
    folder: Path,
    kind: FileKind,
    *,
    tensors: dict[str, dict[str, Any]],
    parents: list[Parent],
    settings: dict[str, Any],
    digests: Mapping[str, str] = MappingProxyType({}),
    made_with: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Hash every file in `folder` and write the manifest last. digests: sha256 of files hashed already, by name.

    made_with: versions that the bytes of the files follow from beside inputs and settings.
    """
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST)
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    more = {"made_with": dict(made_with)} if made_with else {}
    _write(folder / MANIFEST, kind, files, digests, tensors=tensors, parents=parents, settings=settings, more=more)


def sidecar_path(out: Path) -> Path:
    """Where the manifest of a single file lies: model.gguf -> model.gguf.manifest.json"""
    return out.with_name(f"{out.name}.{MANIFEST}")


def write_sidecar(
    path: Path,
    files: dict[str, Path],
    tensors: dict[str, dict[str, Any]],
    parents: list[Parent],
    settings: dict[str, Any],
    *,
    digests: Mapping[str, str] = MappingProxyType({}),
    made_with: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """The manifest of a GGUF file and what belongs to it, at `path`; files: final name -> where they lie now."""
    more = {"made_with": dict(made_with)} if made_with else {}
    _write(path, "gguf", files, digests, tensors=tensors, parents=parents, settings=settings, more=more)


def _write(
    path: Path,
    kind: FileKind,
    files: Mapping[str, Path],
    digests: Mapping[str, str],
    *,
    tensors: dict[str, dict[str, Any]],
    parents: list[Parent],
    settings: dict[str, Any],
    more: dict[str, Any],
) -> None:
    content = {
        "format": FORMAT,
        "kind": kind,
        "created_by": f"qalora-export {__version__}",
        **more,
        "settings": settings,
        "parents": [asdict(parent) for parent in parents],
        "files": {
            name: {"bytes": file.stat().st_size, "sha256": digests.get(name) or sha256_file(file)}
            for name, file in files.items()
        },
        "tensors": tensors,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def made_with(path: Path) -> dict[str, Any]:
    """Versions that the manifest at `path` says its files follow from; empty without a manifest or such a table."""
    try:
        found = manifest_at(path).get("made_with")
    except QaloraError:
        return {}
    return found if isinstance(found, dict) else {}


def files_of(path: Path) -> set[str]:
    """Names of the files that the manifest at `path` lists; empty when there is none, or it is not one of ours."""
    try:
        return set(manifest_at(path)["files"])
    except QaloraError:
        return set()


def has_manifest(folder: Path) -> bool:
    """Whether something of that name is in a folder: a pipe or a broken link there is no folder without a manifest."""
    return os.path.lexists(folder / MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a stage output. Raises InputError when the folder has none (the stage did not finish)."""
    if not has_manifest(folder):
        raise InputError(
            "no manifest.json",
            where=folder,
            why="the stage that writes this folder did not finish",
            fix="run that stage again",
        )
    return manifest_at(folder / MANIFEST)


def manifest_at(path: Path) -> dict[str, Any]:
    """A manifest of any name (a GGUF's lies beside it). UnsafeInputError when it is not one of ours."""
    content: dict[str, Any] = read_json(path)
    known = isinstance(content, dict) and content.get("format") == FORMAT
    if not known or not _tables(content.get("files")) or not _tables(content.get("tensors")):
        raise UnsafeInputError("the manifest is not one of ours", where=path)
    parents = content.get("parents")
    if not isinstance(parents, list) or not all(isinstance(parent, dict) for parent in parents):
        raise UnsafeInputError("the manifest's parents are no list of tables", where=path)
    return content


def is_ours(path: Path) -> bool:
    """Whether a manifest of ours lies at `path`."""
    try:
        manifest_at(path)
    except QaloraError:
        return False
    return True


def _tables(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(entry, dict) for entry in value.values())


def require_intact(folder: Path, what: str, *, hash_of: HashFile = sha256_file) -> None:
    """Refuse an input that its own manifest refutes; a folder without one has nothing to be held against.

    Every stage calls this before it reads. Nothing is remembered between runs: size and times can be set to anything
    (`cp -p`). On a core with SHA instructions hashing takes 0.5 s per GB, twice what reading the file from a fast disk
    takes (tests/benchmarks/hash_inputs.py); within one run, `hash_of` may remember. Raises InputError naming the
    files, UnsafeInputError when the manifest is not one of ours.
    """
    if has_manifest(folder):
        _refuse(folder, what, verify_manifest(folder, hash_of=hash_of))


@contextlib.contextmanager
def intact_meanwhile(folder: Path, what: str) -> Iterator[Callable[[], None]]:
    """require_intact beside the work: small files before the block begins, large ones on a thread while it reads them.

    What is yielded waits for the answer and raises as require_intact; nothing that the block makes may get its name
    before it was called. An error inside the block that damage explains is replaced by that refusal. What is no error,
    a signal, does not wait.
    """
    files = read_manifest(folder)["files"] if has_manifest(folder) else {}
    large = {name for name, entry in files.items() if isinstance(size := entry.get("bytes"), int) and size > LARGE}
    if has_manifest(folder):
        small = {name: entry for name, entry in files.items() if name not in large}
        _refuse(folder, what, verify_files(folder, small) + _unlisted(folder, files))
    stop = threading.Event()
    hash_of = functools.partial(sha256_file, stop=stop)
    with ThreadPoolExecutor(1) as pool:
        wrong = pool.submit(lambda: [name for name in large if not _matches(folder, name, files[name], hash_of)])
        try:
            yield lambda: _refuse(folder, what, wrong.result())
        except Exception:
            _refuse(folder, what, wrong.result())
            raise
        except BaseException:
            stop.set()
            raise
        _refuse(folder, what, wrong.result())


def _refuse(folder: Path, what: str, wrong: list[str]) -> None:
    if wrong:
        raise InputError(
            f"{what} differs from its manifest",
            where=f"{folder}: {', '.join(wrong)}",
            why="damaged, edited or incomplete since it was written",
            fix="fetch it or make it again",
        )


def verify_manifest(folder: Path, *, hash_of: HashFile = sha256_file) -> list[str]:
    """Names of files that differ from the manifest: other size or sha256, missing, or steering and not listed.

    Empty means intact.
    """
    files = read_manifest(folder)["files"]
    return verify_files(folder, files, hash_of=hash_of) + _unlisted(folder, files)


def _unlisted(folder: Path, files: Collection[str]) -> list[str]:
    return [name for name in steering_files(folder) if name not in files and name != MANIFEST]


def is_unchanged(path: Path) -> bool:
    """Whether an artifact, a folder or a file with its manifest beside it, is of our making and as we wrote it."""
    beside = sidecar_path(path)
    if path.is_dir():
        return is_ours(path / MANIFEST) and not verify_manifest(path)
    return is_ours(beside) and not verify_files(path.parent, manifest_at(beside)["files"])


def verify_files(folder: Path, files: dict[str, dict[str, Any]], *, hash_of: HashFile = sha256_file) -> list[str]:
    """Those of a table of files (name -> {"bytes", "sha256"}) whose size or sha256 differs, or which are missing."""
    large = sum(size for entry in files.values() if isinstance(size := entry.get("bytes"), int)) > SHOW_PROGRESS
    names = track(files, f"check {folder.name}") if large else files
    return [name for name in names if not _matches(folder, name, files[name], hash_of)]


def _matches(folder: Path, name: str, expected: dict[str, Any], hash_of: HashFile) -> bool:
    try:
        path = inside(folder, name)
    except InputError:
        return False
    return path.stat().st_size == expected.get("bytes") and hash_of(path) == expected.get("sha256")
