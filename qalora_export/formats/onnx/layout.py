"""Where things lie in an ONNX folder, so that every host finds them.

    config.json, generation_config.json      transformers.js; tokenizer.json, tokenizer_config.json: every host
    genai_config.json                        ONNX Runtime GenAI; its `filename` may name a file in a subfolder
    tokenizer_module.json, genai_tokenizer.json   GenAI alone, where its own tokenizer needs them (genai_text/files.py)
    onnx/model.onnx, onnx/model.onnx_data    transformers.js takes no other place and no other name of the data

Folders of earlier versions hold model.onnx and model.onnx.data at the top; they are read as ever, except by
transformers.js.
"""

from __future__ import annotations

import os
from pathlib import Path

from qalora_export.errors import InputError, UnsafeInputError
from qalora_export.safety import inside

GRAPH, DATA = "onnx/model.onnx", "onnx/model.onnx_data"
FLAT_GRAPH, FLAT_DATA = "model.onnx", "model.onnx.data"  # of earlier versions
GRAPHS = (GRAPH, FLAT_GRAPH)
GENAI_CONFIG = "genai_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"


def graph_name(folder: Path) -> str:
    """The graph of an ONNX folder, relative to it: one of GRAPHS.

    Raises InputError when there is none, UnsafeInputError when there are two: hosts would run different ones.
    """
    there = [name for name in GRAPHS if os.path.lexists(folder / name)]
    if len(there) > 1:
        raise UnsafeInputError(
            "two graphs in one folder", where=folder, why=" and ".join(there), fix="export the folder again"
        )
    if not there:
        raise InputError(f"no {GRAPH} here", where=folder, fix="give a folder written by `qalora-export export onnx`")
    return there[0]


def graph_file(folder: Path) -> Path:
    """The graph of an ONNX folder, a regular file inside it. Raises as graph_name and safety.inside."""
    return inside(folder, graph_name(folder))


def is_onnx_folder(folder: Path) -> bool:
    """Whether a folder is an ONNX artifact; a model folder that has safetensors beside an onnx/ is none."""
    return any(os.path.lexists(folder / name) for name in GRAPHS) and not any(folder.glob("*.safetensors"))
