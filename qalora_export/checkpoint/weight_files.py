"""The names under which a model folder holds its weights.

    model.safetensors.index.json        shards of any name, listed there
    model.safetensors                   one file

AutoGPTQ names neither "model": `model_file_base_name` of its config says what stands there instead, and when that is
empty, `gptq_model-{bits}bit-{group_size}g`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qalora_export.safety import inside, read_json

SUFFIX = ".safetensors"
INDEX_SUFFIX = f"{SUFFIX}.index.json"
INDEX = f"model{INDEX_SUFFIX}"
SINGLE = f"model{SUFFIX}"
AUTOGPTQ_CONFIG = "quantize_config.json"  # AutoGPTQ before 0.5 wrote its config here only
STEM = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,200}")  # a plain name, no path


def main_file(folder: Path) -> str | None:
    """The index or the single weight file of a folder, by name; None when it has neither."""
    names = [f"{stem}{suffix}" for stem in stems(folder) for suffix in (INDEX_SUFFIX, SUFFIX)]
    return next((name for name in names if (folder / name).is_file()), None)


def stems(folder: Path) -> list[str]:
    """Names without suffix, in the order in which they count. Raises UnsafeInputError for a config that is no JSON."""
    found = ["model"]
    for config in _configs(folder):
        bits, group = config.get("bits"), config.get("group_size")
        found += [str(config.get("model_file_base_name") or ""), f"gptq_model-{bits}bit-{group}g"]
    return [stem for stem in dict.fromkeys(found) if STEM.fullmatch(stem)]


def _configs(folder: Path) -> list[dict[str, Any]]:
    files = [name for name in (AUTOGPTQ_CONFIG, "config.json") if (folder / name).is_file()]
    read = {name: read_json(inside(folder, name)) for name in files}
    if isinstance(config := read.get("config.json"), dict):
        read["config.json"] = config.get("quantization_config")
    return [config for config in read.values() if isinstance(config, dict)]
