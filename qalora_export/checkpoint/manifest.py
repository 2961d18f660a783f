"""manifest.json: the commit mark and the provenance chain base → adapter → merged → artifact.

It is the last file written. It names every file of its folder with size and sha256, every tensor with dtype, shape
and sha256, the settings that made them, and the sha256 of each parent's manifest. It holds no time and no absolute
path, so equal inputs and settings give equal bytes.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from qalora_export.checkpoint.model_folder import COMPANIONS
from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.safety import inside, read_json, sha256_bytes, sha256_file

MANIFEST = "manifest.json"
FORMAT = "qalora-manifest/1"
FileKind = Literal["base", "adapter", "merged", "gguf", "onnx"]


@dataclass(frozen=True, slots=True)
class Parent:
    """What this artifact was made from: role ("source", "base", "adapter", "checkpoint"), name, manifest sha256."""

    role: str
    name: str
    sha256: str


def parent_of(folder: Path, role: str) -> Parent:
    """Reference to a stage output (by its manifest), to a plain folder (by its config, weights and tokenizer) or to a
    file (by its bytes).
    """
    if folder.is_file():
        return Parent(role, folder.name, sha256_file(folder))
    if (folder / MANIFEST).is_file():
        return Parent(role, folder.name, sha256_file(folder / MANIFEST))
    files = sorted(p for p in folder.glob("*") if p.suffix in {".json", ".safetensors"} or p.name in COMPANIONS)
    listing = "".join(f"{p.name} {sha256_file(p)}\n" for p in files)
    return Parent(role, folder.name, sha256_bytes(listing.encode()))


def write_manifest(
    folder: Path,
    kind: FileKind,
    *,
    tensors: dict[str, dict[str, Any]],
    parents: list[Parent],
    settings: dict[str, Any],
    name: str = MANIFEST,
    digests: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Hash every file in `folder` and write the manifest last. digests: sha256 of files hashed already, by name."""
    from qalora_export.version import __version__

    files = {
        key: {"bytes": path.stat().st_size, "sha256": digests.get(key) or sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != name and (key := path.relative_to(folder).as_posix())
    }
    content = {
        "format": FORMAT,
        "kind": kind,
        "created_by": f"qalora-export {__version__}",
        "settings": settings,
        "parents": [asdict(parent) for parent in parents],
        "files": files,
        "tensors": tensors,
    }
    (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a stage output. Raises InputError when the folder has none (the stage did not finish)."""
    if not (folder / MANIFEST).is_file():
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


def _tables(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(entry, dict) for entry in value.values())


def verify_manifest(folder: Path) -> list[str]:
    """Names of files whose size or sha256 differs from the manifest, or which are missing. Empty means intact."""
    return verify_files(folder, read_manifest(folder)["files"])


def verify_files(folder: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """The same for a table of files: name -> {"bytes", "sha256"}."""
    wrong = []
    for name, expected in files.items():
        try:
            path = inside(folder, name)
        except InputError:
            wrong.append(name)
            continue
        if path.stat().st_size != expected.get("bytes") or sha256_file(path) != expected.get("sha256"):
            wrong.append(name)
    return wrong
