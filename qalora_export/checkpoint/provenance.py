"""The chain source → base → adapter → merged → artifact, each link checked by the sha256 of the parent's manifest.

A parent that is not on this machine is reported as "not found" and breaks nothing. A parent that is here under its
recorded name but hashes differently, a file changed since its manifest was written, and an adapter trained on another
base than the one it was merged into are broken links, and gate G0 fails on them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from qalora_export.checkpoint.manifest import (
    MANIFEST,
    has_manifest,
    parent_of,
    read_manifest,
    sidecar_path,
    verify_manifest,
)
from qalora_export.errors import InputError
from qalora_export.safety import HashFile, inside, read_json, sha256_file

State = Literal["verified", "not found", "broken"]
MAX_DEPTH = 8  # source, base, adapter, merged, artifact; deeper than that is a loop


@dataclass(frozen=True, slots=True)
class Link:
    """child was made from parent (in `role`), whose manifest had this sha256. note: why it is broken."""

    child: str
    role: str
    parent: str
    sha256: str
    state: State
    note: str = ""

    def as_json(self) -> dict[str, str]:
        return asdict(self)


def artifact_manifest(artifact: Path) -> Path:
    """Where an exporter leaves the manifest: beside a file, inside a folder."""
    return artifact / MANIFEST if artifact.is_dir() else sidecar_path(artifact)


def artifact_links(artifact: Path, checkpoint: Path, *, hash_of: HashFile = sha256_file) -> list[Link]:
    """Links of an exported artifact: its own files, then the checkpoint it says it was made from."""
    manifest = artifact_manifest(artifact)
    if not os.path.lexists(manifest):
        return [Link(artifact.name, "manifest", manifest.name, "", "not found", "no manifest beside the artifact")]
    content = read_json(manifest)
    return [*_file_links(artifact, content, hash_of), *_checkpoint_links(artifact, content, checkpoint)]


def _file_links(artifact: Path, content: Any, hash_of: HashFile) -> Iterator[Link]:
    folder = artifact if artifact.is_dir() else artifact.parent
    for name, recorded in sorted(_table(content, "files").items()):
        digest = recorded.get("sha256", "") if isinstance(recorded, dict) else ""
        intact = _hash_inside(folder, name, hash_of) == digest
        note = "" if intact else "the file is not the one that was exported"
        yield Link(artifact.name, "file", name, digest, "verified" if intact else "broken", note)


def _hash_inside(folder: Path, name: str, hash_of: HashFile) -> str | None:
    try:
        return hash_of(inside(folder, name))
    except InputError:
        return None


def _checkpoint_links(artifact: Path, content: Any, checkpoint: Path) -> Iterator[Link]:
    actual = sha256_file(checkpoint / MANIFEST) if has_manifest(checkpoint) else ""
    for parent in _parents(content):
        if parent["role"] == "checkpoint":
            same = parent["sha256"] == actual
            yield Link(
                artifact.name,
                "checkpoint",
                parent["name"],
                parent["sha256"],
                "verified" if same else "broken",
                "" if same else f"exported from another checkpoint than {checkpoint.name}",
            )


def checkpoint_links(
    checkpoint: Path,
    *,
    base: Path | None = None,
    adapter: Path | None = None,
    original: Path | None = None,
    hash_of: HashFile = sha256_file,
) -> list[Link]:
    """Links of a checkpoint and of every ancestor found beside it, nearest first.

    base, adapter, original: stand for those that the manifests name.
    """
    given = {"base": base, "adapter": adapter}
    links: list[Link] = []
    queue = [(checkpoint, 0)]
    for folder, depth in queue:
        if not has_manifest(folder) or depth > MAX_DEPTH:
            continue
        links += [
            Link(folder.name, "file", name, "", "broken", "changed since its manifest was written")
            for name in verify_manifest(folder, hash_of=hash_of)
        ]
        parents = _parents(read_manifest(folder))
        for parent in parents:
            stands_for = given.get(parent["role"]) if depth == 0 else None
            found = _find(folder, parent, original if parent["role"] == "source" else stands_for)
            links.append(_link(folder, parent, found, hash_of))
            if found is not None and links[-1].state == "verified":
                queue.append((found, depth + 1))
                links += _adapter_base(found, parent, parents)
    return links


def parent_folder(checkpoint: Path, role: str, *, hash_of: HashFile = sha256_file) -> Path | None:
    """The parent in `role` beside a checkpoint, by name and manifest hash; None when it is not there."""
    if not has_manifest(checkpoint):
        return None
    for parent in _parents(read_manifest(checkpoint)):
        found = _find(checkpoint, parent, None)
        if parent["role"] == role and found and parent_of(found, role, hash_of=hash_of).sha256 == parent["sha256"]:
            return found
    return None


def kind_of(checkpoint: Path) -> str:
    """ "base", "merged", …; empty without a manifest."""
    return str(read_manifest(checkpoint).get("kind", "")) if has_manifest(checkpoint) else ""


def _find(folder: Path, parent: dict[str, str], given: Path | None) -> Path | None:
    if given is not None:
        return given
    name = parent["name"]
    if name != Path(name).name or name in ("", ".", ".."):
        return None
    beside = folder.resolve().parent / name
    return beside if beside.exists() else None


def _link(folder: Path, parent: dict[str, str], found: Path | None, hash_of: HashFile) -> Link:
    values = (folder.name, parent["role"], parent["name"], parent["sha256"])
    if found is None:
        return Link(*values, "not found", "not beside the checkpoint")
    same = parent_of(found, parent["role"], hash_of=hash_of).sha256 == parent["sha256"]
    return Link(
        *values, "verified" if same else "broken", "" if same else f"{found.name} is not the one it was made from"
    )


def _adapter_base(adapter: Path, parent: dict[str, str], siblings: list[dict[str, str]]) -> list[Link]:
    """An adapter must have been trained on the very base it was merged into."""
    if parent["role"] != "adapter" or not has_manifest(adapter):
        return []
    merged_into = {p["sha256"] for p in siblings if p["role"] == "base"}
    trained_on = {p["sha256"] for p in _parents(read_manifest(adapter)) if p["role"] == "base"}
    if not trained_on or trained_on == merged_into:
        return []
    return [Link(adapter.name, "base", "", next(iter(trained_on)), "broken", "the adapter was trained on another base")]


def _parents(content: Any) -> list[dict[str, str]]:
    parents = content.get("parents") if isinstance(content, dict) else None
    if not isinstance(parents, list) or not all(
        isinstance(p, dict) and all(isinstance(p.get(key), str) for key in ("role", "name", "sha256")) for p in parents
    ):
        raise InputError("a manifest's parents are malformed", why="expected a list of role, name and sha256")
    return parents


def _table(content: Any, key: str) -> dict[str, Any]:
    table = content.get(key) if isinstance(content, dict) else None
    if not isinstance(table, dict):
        raise InputError(f"a manifest has no table {key!r}")
    return table
