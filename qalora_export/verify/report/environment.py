"""The part of report.json that says what was verified, with what, and how to do it again."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qalora_export.checkpoint.canonical import PARTS, CanonicalCheckpoint
from qalora_export.checkpoint.manifest import MANIFEST
from qalora_export.checkpoint.provenance import kind_of
from qalora_export.formats.gguf.split import adapter_path
from qalora_export.models.families import family_of
from qalora_export.models.families.family import Format
from qalora_export.safety import sha256_bytes, sha256_file
from qalora_export.verify.identity import Identities, combined
from qalora_export.verify.session import Session
from qalora_export.verify.target import Target
from qalora_export.version import __version__

PACKAGES = (
    "torch",
    "transformers",
    "numpy",
    "gguf",
    "onnx",
    "onnxruntime",
    "onnxruntime-genai",
    "xllamacpp",
    "llama-cpp-python",
    "mobius-onnx",
)
NO_MANIFEST = ("manifest", "not found")  # role and state of an artifact's link


def describe_inputs(session: Session, targets: list[Target], base: Path | None) -> dict[str, Any]:
    """Everything of report.json but verdict, gates and provenance."""
    checkpoint, probes, settings = session.checkpoint, session.probes, session.settings
    counts = parameter_counts(checkpoint)
    artifacts = {target.name: target.artifact for target in targets}
    return {
        "checkpoint": {
            "name": checkpoint.path.name,
            "kind": kind_of(checkpoint.path),
            "manifest_sha256": _hash_if_file(checkpoint.path / MANIFEST),
            **counts,
        },
        "artifacts": [
            describe_artifact(p, artifacts, counts["parameters"], session.files)
            | {"context": context_of(checkpoint.config, "gguf" if p.is_file() else "onnx")}
            for p in dict.fromkeys(artifacts.values())
        ],
        "probe": {
            "sequences": len(probes.lengths),
            "positions": int(probes.ids.size),
            "sha256": probes.sha256,
            "seed": settings.seed,
            "prompts": Path(settings.prompts).name if settings.prompts else None,
            "texts": len(probes.texts),
            "conversations": len(probes.chats),
            "names": list(probes.names),
            "lengths": probes.lengths.tolist(),
        },
        "task": None if session.task is None else session.task.describe(),
        "runtimes": {
            run: {key: value for key, value in fingerprint.items() if key != "machine"}
            for run, fingerprint in session.runs.fingerprints.items()
        },
        "reference": {
            "what": "PyTorch float32, eager attention (fused in the long sequence), one sequence at a time",
            "threads": settings.threads,
            "seconds": round(session.reference_seconds, 3),
            "from_earlier_runs": list(session.kept),
        },
        "environment": environment() | {"cpu": _machine(session)},
        "settings": settings.model_dump(mode="json"),
        "not_checked": not_checked(session),
        "command": command_line(checkpoint.path, artifacts, base, session),
    }


def context_of(config: Mapping[str, Any], fmt: Format) -> dict[str, Any]:
    """positions: of the artifact's context, all that this report speaks of; note: why it ends before the model's."""
    family = family_of(config)
    bound = family.bound(config, fmt)
    positions = family.exported(config, fmt)["max_position_embeddings"]
    return {"positions": positions, "note": None if bound is None else str(bound)}


def not_checked(session: Session) -> list[str]:
    """What nobody could hold the files against, each in words; the verdict must not sound as if it had been."""
    bare = [f"{link.child} has no manifest" for link in session.links if (link.role, link.state) == NO_MANIFEST]
    return [*session.ancestry.gaps, *bare]


def parameter_counts(checkpoint: CanonicalCheckpoint) -> dict[str, int]:
    """parameters of the model, and how many of them are quantized weights."""
    quantized = 0
    for module, (_, group_size) in checkpoint.modules.items():
        rows, groups = checkpoint.entry(f"{module}.{PARTS[1]}").shape
        quantized += rows * groups * group_size
    plain = sum(_size(checkpoint.entry(name).shape) for name in checkpoint.plain_names())
    return {"parameters": quantized + plain, "quantized_parameters": quantized}


def describe_artifact(path: Path, artifacts: dict[str, Path], parameters: int, known: Identities) -> dict[str, Any]:
    """Name, bytes of weights and graph (not the tokenizer), sha256, bits per weight over all parameters.

    known: the files as they were before the first gate. What was verified is named, not what lies there by now.
    """
    inside = [file for file in known if file.parent in (path, path / "onnx") and file.name.startswith("model.onnx")]
    beside = [file for file in (path, adapter_path(path)) if file in known]
    files = {file.name: known[file] for file in inside or beside}
    nbytes = sum(file.size for file in files.values())
    whole = known[path].sha256 if path in known else sha256_bytes(combined(files.items()).encode())
    return {
        "name": path.name,
        "runtimes": [runtime for runtime, artifact in artifacts.items() if artifact == path],
        "bytes": nbytes,
        "bits_per_weight": round(8 * nbytes / parameters, 3),
        "sha256": whole,
        "files": {name: file.sha256 for name, file in files.items()},
    }


def environment() -> dict[str, Any]:
    return {
        "qalora-export": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def command_line(checkpoint: Path, artifacts: dict[str, Path], base: Path | None, session: Session) -> str:
    """The command that makes this report again, with file names instead of the paths of this machine."""
    settings = session.settings
    words = ["qalora-export", "verify-parity", checkpoint.name]
    for path in dict.fromkeys(artifacts.values()):
        words += ["--gguf" if path.is_file() else "--onnx", path.name]
    words += ["--base", base.name] if base else []
    words += ["--without-parents"] if settings.without_parents else []
    words += ["--prompts", Path(settings.prompts).name] if settings.prompts else []
    for runtime in artifacts:
        words += ["--runtime", runtime]
    if session.task is not None:
        asked = session.task.settings
        words += ["--evaluate", Path(asked.data).name, "--max-new-tokens", str(asked.max_new_tokens)]
        words += ["--scored", str(settings.scored)]
    for flag in ("sequences", "positions", "max_length", "threads", "seed"):
        words += [f"--{flag.replace('_', '-')}", str(getattr(settings, flag))]
    return shlex.join([*words, "--out", "parity"])


def _machine(session: Session) -> dict[str, Any]:
    """CPU, flags and system as the runners saw them; they all ran here."""
    found = [fingerprint.get("machine") for fingerprint in session.runs.fingerprints.values()]
    return next((machine for machine in found if machine), {})


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hash_if_file(path: Path) -> str | None:
    return sha256_file(path) if path.is_file() else None


def _size(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
