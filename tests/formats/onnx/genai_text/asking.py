"""ONNX Runtime GenAI's own tokenizer on tokenizer files, as an export of them would give them to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime_genai as genai

from qalora_export.formats.onnx.genai_text.files import genai_files

DECODER = {"filename": "onnx/model.onnx", "hidden_size": 8, "head_size": 8, "num_attention_heads": 1}
DECODER |= {"num_key_value_heads": 1, "num_hidden_layers": 1}
MODEL = {"type": "llama", "vocab_size": 300_000, "context_length": 64, "bos_token_id": 1, "eos_token_id": 2}


def genai_ids(
    folder: Path, tokenizer: dict[str, Any], settings: dict[str, Any], texts: Sequence[str]
) -> list[list[int]]:
    """Ids by GenAI of a folder that is written here: the files of the checkpoint, and what genai_files adds."""
    written = {"tokenizer.json": tokenizer, "tokenizer_config.json": settings, **genai_files(tokenizer, settings)}
    written["genai_config.json"] = {"model": MODEL | {"decoder": DECODER}}
    folder.mkdir(parents=True)
    for name, content in written.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    own = genai.Tokenizer(str(folder))
    return [own.encode(text).tolist() for text in texts]
