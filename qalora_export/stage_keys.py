"""What the result of a stage depends on, as hashes: when one of them changes, `run` makes it again.

A key covers the stage's inputs, its settings, every source file and template of ours (the runners' too), the installed
packages whose code its result passes through and, for verify-parity, the CPU. Packages count with the hashes that pip
recorded of their files, so a rebuilt wheel of the same version is another package.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from qalora_runtimes.launch import RUNNERS

from qalora_export.checkpoint.manifest import (
    MANIFEST,
    is_ours,
    manifest_at,
    parent_of,
    sidecar_path,
    verify_files,
    verify_manifest,
)
from qalora_export.installed import code_version, kernels, package_version
from qalora_export.safety import regular_file, sha256_bytes, sha256_file

# Distribution names. A model passes through the first group in every stage: weights, tokenizer, chat template.
MODEL = ("jinja2", "ml-dtypes", "numpy", "safetensors", "sentencepiece", "tokenizers", "torch", "transformers")
GGUF = ("gguf",)
ONNX = ("mobius-onnx", "onnx", "onnx-ir", "onnxscript", "protobuf")
PACKAGES = {
    "quantize": MODEL,
    "train": (*MODEL, "accelerate", "bitsandbytes", "triton"),
    "merge": (*MODEL, "triton"),
    "evaluate base": (*MODEL, "triton"),
    "evaluate merged": (*MODEL, "triton"),
    "export gguf": (*MODEL, *GGUF),
    "export onnx": (*MODEL, *ONNX),
    "verify-parity": (*MODEL, *GGUF, *ONNX, "llama-cpp-python", "matplotlib", *(r.package for r in RUNNERS.values())),
}
PACKAGES["compare"] = (*dict.fromkeys(name for names in PACKAGES.values() for name in names), "peft", "scipy")
EVERY = tuple(dict.fromkeys(name for names in PACKAGES.values() for name in names))
SOURCE_STAGE, VERIFY = "quantize", "verify-parity"


def stage_key(stage: str, inputs: Iterable[Path], settings: BaseModel | None) -> str:
    """sha256 over everything the result depends on. Raises InputError for an input that is not there."""
    paths = tuple(inputs)
    values = _without_places(settings.model_dump(mode="json") if settings else {}, paths)
    content = {
        "stage": stage,
        "settings": values,
        "code": code_version(),
        "python": platform.python_version_tuple()[:2],
        "packages": {name: package_version(name) for name in PACKAGES.get(stage, EVERY)},
        "machine": kernels() if stage == VERIFY else None,
        "inputs": [_input_hash(path, stage) for path in paths],
    }
    return sha256_bytes(json.dumps(content, sort_keys=True).encode())


def _without_places(values: Any, paths: tuple[Path, ...]) -> Any:
    """Settings in which a path is what it holds, not where it lies."""
    if isinstance(values, dict):
        return {name: _without_places(value, paths) for name, value in values.items()}
    return "input" if isinstance(values, str) and Path(values) in paths else values


def _input_hash(path: Path, stage: str) -> str:
    """An earlier stage's output counts by its manifest (`run` has held it against the files), all else by content."""
    if path.is_dir():
        return parent_of(path, "source" if stage == SOURCE_STAGE else "input").sha256
    return output_hash(regular_file(path, "input", fix="check the path in the recipe"))


def output_hash(path: Path) -> str:
    """Identity of an output: its manifest where it has one, else its bytes."""
    if path.is_file():
        return sha256_file(_sidecar(path) or path)
    if is_ours(path / MANIFEST):
        return sha256_file(path / MANIFEST)
    return sha256_bytes("".join(f"{p.relative_to(path)} {sha256_file(p)}\n" for p in _tree(path)).encode())


def intact(path: Path, expected: str) -> bool:
    """Whether an output is still what was recorded: same identity, every file as its manifest says, none added."""
    if not path.exists() or output_hash(path) != expected:
        return False
    if path.is_file():
        sidecar = _sidecar(path)
        return sidecar is None or not verify_files(path.parent, manifest_at(sidecar)["files"])
    return not is_ours(path / MANIFEST) or not verify_manifest(path)


def _sidecar(path: Path) -> Path | None:
    """The manifest of ours beside a GGUF file; a data file's identity is its bytes, whatever lies beside it."""
    sidecar = sidecar_path(path)
    return sidecar if path.suffix == ".gguf" and is_ours(sidecar) else None


def _tree(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
