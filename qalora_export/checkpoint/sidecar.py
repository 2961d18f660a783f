"""`<out>.manifest.json`: the commit mark and provenance of a GGUF file, in the format of checkpoint.manifest."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qalora_export.checkpoint.manifest import FORMAT, Parent
from qalora_export.errors import QaloraError
from qalora_export.safety import read_json, sha256_file
from qalora_export.version import __version__


def sidecar_path(out: Path) -> Path:
    """model.gguf -> model.gguf.manifest.json"""
    return out.with_name(f"{out.name}.manifest.json")


def files_of(path: Path) -> set[str]:
    """Names of the files a sidecar lists; empty when there is none, or it is not one of ours."""
    try:
        content = read_json(path)
    except QaloraError:
        return set()
    files = content.get("files") if isinstance(content, dict) and content.get("format") == FORMAT else None
    return set(files) if isinstance(files, dict) else set()


def write_sidecar(
    path: Path,
    files: dict[str, Path],
    tensors: dict[str, dict[str, Any]],
    parents: list[Parent],
    settings: dict[str, Any],
    *,
    digests: dict[str, str] | None = None,
) -> None:
    """Hash the finished files (final name -> where they lie now) and write the manifest, without times and paths.

    digests: sha256 of files that the caller has hashed already.
    """
    digests = digests or {name: sha256_file(file) for name, file in files.items()}
    content = {
        "format": FORMAT,
        "kind": "gguf",
        "created_by": f"qalora-export {__version__}",
        "settings": settings,
        "parents": [asdict(parent) for parent in parents],
        "files": {name: {"bytes": f.stat().st_size, "sha256": digests[name]} for name, f in files.items()},
        "tensors": tensors,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
