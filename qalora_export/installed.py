"""Our code, the installed packages and the CPU, as text that changes when one of them does."""

from __future__ import annotations

import hashlib
import importlib.metadata
from functools import cache
from pathlib import Path
from typing import Any

import qalora_runtimes
from qalora_runtimes.fingerprint import machine

from qalora_export.safety import sha256_bytes, sha256_file


@cache
def code_version() -> str:
    """sha256 over every file of our two packages but compiled ones: any change of code or template counts."""
    digest = hashlib.sha256()
    for root in (Path(__file__).parent, Path(qalora_runtimes.__file__).parent):
        for path in sorted(root.rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                digest.update(f"{root.name}/{path.relative_to(root).as_posix()}\0{sha256_file(path)}\0".encode())
    return digest.hexdigest()


@cache
def package_version(name: str) -> str | None:
    """Version and file hashes of an installed distribution; None when it is not installed."""
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    # Scripts outside the package hold the path of their environment.
    lines = [line for line in (found.read_text("RECORD") or "").splitlines() if not line.startswith("..")]
    return f"{found.version} {sha256_bytes(chr(10).join(sorted(lines)).encode())}"


@cache
def kernels() -> dict[str, Any]:
    """What runtimes choose their kernels by."""
    found = machine()
    return {key: found[key] for key in ("architecture", "model", "flags")}
