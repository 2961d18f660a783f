"""What the manifest of our own adapters says: the base they were trained over, pool and scaling of every module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qalora_export.checkpoint.manifest import MANIFEST, parent_of, read_manifest, verify_manifest
from qalora_export.errors import InputError, UnsafeInputError


def modules_of(folder: Path, base: Path | None) -> dict[str, Any]:
    """The "modules" table of our manifest, after checking files and base."""
    manifest = read_manifest(folder)
    if manifest.get("kind") != "adapter":
        raise InputError(f"this folder holds a {manifest.get('kind')}, not an adapter", where=folder)
    if damaged := verify_manifest(folder):
        raise InputError(
            "adapter files differ from their manifest",
            where=f"{folder}: {', '.join(damaged)}",
            why="damaged or edited after training",
            fix="fetch or train the adapter again",
        )
    trained_on = _parent_base(manifest)
    if base is not None and trained_on["sha256"] != (actual := parent_of(base, "base")).sha256:
        raise InputError(
            "the adapter was trained over another base",
            where=folder,
            why=f"it names {trained_on['name']} ({trained_on['sha256'][:12]}…), this base is "
            f"{actual.name} ({actual.sha256[:12]}…)",
            fix="give the base it was trained on",
        )
    settings = manifest.get("settings")
    adapter = settings.get("adapter") if isinstance(settings, dict) else None
    modules = adapter.get("modules") if isinstance(adapter, dict) else None
    if not isinstance(modules, dict):
        raise UnsafeInputError("the adapter's manifest lists no modules", where=folder / MANIFEST)
    return modules


def _parent_base(manifest: dict[str, Any]) -> dict[str, str]:
    """name and sha256 of the base an adapter names as its parent; empty strings when it names none."""
    parents = manifest.get("parents")
    for parent in parents if isinstance(parents, list) else []:
        if isinstance(parent, dict) and parent.get("role") == "base":
            return {key: str(parent.get(key, "")) for key in ("name", "sha256")}
    return {"name": "none", "sha256": ""}


def as_trained(table: dict[str, Any], module: str, file_pool: int, where: str) -> tuple[int, float]:
    """(columns of the file per column as trained, scaling) of one module of our own adapter."""
    entry = table.get(module)
    pool, scaling = (entry.get("pool"), entry.get("scaling")) if isinstance(entry, dict) else (None, None)
    if type(pool) is not int or pool <= 0 or pool % file_pool or not isinstance(scaling, int | float):
        raise UnsafeInputError("the manifest's pool or scaling is not usable", where=where, why=str(entry)[:200])
    return pool // file_pool, float(scaling)
