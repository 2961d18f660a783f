"""What ONNX Runtime GenAI needs beside the model: genai_config.json and the tokenizer's own files, unchanged."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_export.checkpoint.model_folder import TOKENIZER_FILES, ModelFolder
from qalora_export.formats.onnx.validate import GENAI_CONFIG
from qalora_export.models.families import family_of
from qalora_export.safety import read_json

if TYPE_CHECKING:
    from mobius import ModelPackage

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_genai_folder(folder: Path, package: ModelPackage, checkpoint: ModelFolder) -> None:
    """Write genai_config.json (mobius' own, then our deviations) and copy the tokenizer files."""
    from mobius.integrations.ort_genai import write_ort_genai_config

    context = int(checkpoint.config["max_position_embeddings"])
    with tempfile.TemporaryDirectory(prefix="qalora-onnx-") as scratch:
        write_ort_genai_config(package, scratch, ep="cpu", context_length=context)
        config = read_json(Path(scratch) / GENAI_CONFIG)
    generation = read_json(checkpoint.path / "generation_config.json") if _has_generation(checkpoint) else {}
    _adjust(config, checkpoint.config, generation)
    config["model"]["type"] = family_of(checkpoint.config).genai_type or config["model"]["type"]
    (folder / GENAI_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in checkpoint.companions():
        if path.name in TOKENIZER_FILES:
            shutil.copyfile(path, folder / path.name)


def _adjust(config: dict[str, Any], model: Mapping[str, Any], generation: Mapping[str, Any]) -> None:
    """Greedy by default, so that two runs agree; token ids as `generate` of Transformers would see them."""
    config["search"] |= {"do_sample": False, "top_k": 1}
    for key in TOKEN_IDS:
        value = generation.get(key, model.get(key))
        if value is not None:
            config["model"][key] = value


def _has_generation(checkpoint: ModelFolder) -> bool:
    return any(path.name == "generation_config.json" for path in checkpoint.companions())
