"""What quantizing and merging leave as it is: config, generation config, tokenizer, chat template, file by file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qalora_export.checkpoint.differences import differences
from qalora_export.checkpoint.manifest import MANIFEST, steering_files
from qalora_export.checkpoint.model_folder import COMPANIONS
from qalora_export.errors import QaloraError
from qalora_export.safety import inside, read_json, sha256_file

CONFIG, QUANTIZATION = "config.json", "quantization_config"
OURS = {MANIFEST, "quantize_report.json"}  # a stage's own notes on what it did
TAKEN = {CONFIG, *COMPANIONS}
WEIGHTS = (".safetensors", ".safetensors.index.json")


def changed_on_the_way(parent: Path, child: Path, *, called: str | None = None) -> list[str]:
    """One line for everything in a child's files, but its weights, that is not its parent's.

    JSON key by key, with the parent's value and the child's. `quantization_config` is left out: what it says belongs to
    the weights. A parent may hold files that no stage takes along. called: the
    parent's name. Raises InputError for files that cannot be read.
    """
    here, there = set(_files(child)), {name for name in _files(parent) if name in TAKEN}
    found = list[str]()
    for name in sorted(there | here):
        if name not in here:
            found.append(f"{name}: not in {child.name}")
        elif name not in there:
            found.append(f"{name}: not in {called or parent.name}")
        elif sha256_file(inside(child, name)) != sha256_file(inside(parent, name)):
            lines = list(_differences(parent, child, name)) if name.endswith(".json") else []
            same = name.endswith(".json") and not lines  # written anew, and says what it said
            found += [] if same else lines or [f"{name}: other text ({(child / name).stat().st_size} bytes)"]
    return found


def _files(folder: Path) -> Iterator[str]:
    for name in steering_files(folder):
        if name not in OURS and not name.endswith(WEIGHTS):
            yield name


def _differences(parent: Path, child: Path, name: str) -> Iterator[str]:
    try:
        expected, found = (_table(folder, name) for folder in (parent, child))
    except QaloraError as error:
        yield f"{name}: {error.what}"
        return
    yield from differences(expected, found, f"{name}: ")


def _table(folder: Path, name: str) -> Any:
    content = read_json(inside(folder, name))
    if name == CONFIG and isinstance(content, dict):
        return {key: value for key, value in content.items() if key != QUANTIZATION}
    return content
