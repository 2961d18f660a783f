"""What the gates need from an ONNX folder: contents, facts of the graph, of genai_config.json and of the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.formats.onnx.read import OnnxContents, read_back
from qalora_export.safety import inside, read_json
from qalora_export.verify.runtimes.facts import ABSENT

NORMS = ("RMSNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")
ATTENTION = "GroupQueryAttention"
EMBEDDING = "model.embed_tokens.weight"
GENAI_CONFIG = "genai_config.json"
# Fact -> key of genai_config.json, in `model` or in `model.decoder`.
GENAI_SIZES = {
    "vocabulary": "vocab_size",
    "hidden size": "hidden_size",
    "layers": "num_hidden_layers",
    "attention heads": "num_attention_heads",
    "context length": "context_length",
    "key/value heads": "num_key_value_heads",
    "head size": "head_size",
}
# A float32 angle of p radians is right to p·2^-24; tables are made by different float32 routines.
TABLE_ERROR, TABLE_ERROR_PER_RADIAN = 1e-6, 2.0**-21


def contents_of(folder: Path) -> OnnxContents:
    """Read back by the onnx package."""
    return read_back(folder)


def graph_facts(contents: OnnxContents) -> dict[str, Any]:
    """Facts that the graph itself computes with; a value that differs between nodes is reported as a list."""
    import onnx

    graph = contents.model.graph
    attributes = [
        (node.op_type, {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}) for node in graph.node
    ]
    attention = [values for kind, values in attributes if kind == ATTENTION]
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    heads = _single(a.get("num_heads") for a in attention)
    table = shapes.get(_table_name(graph, 7), [ABSENT, ABSENT])
    return {
        "vocabulary": shapes.get(EMBEDDING, [ABSENT])[0],
        "hidden size": shapes.get(EMBEDDING, [ABSENT])[-1],
        "layers": len(attention),
        "attention heads": heads,
        "key/value heads": _single(a.get("kv_num_heads") for a in attention),
        "head size": 2 * table[-1] if isinstance(table[-1], int) else ABSENT,
        "context length": table[0],
        "norm epsilon": _single(a.get("epsilon", 1e-5) for kind, a in attributes if kind in NORMS),
        "attention scale": _single(a.get("scale") for a in attention),
        "RoPE frequencies": _frequencies(contents),
    }


def genai_facts(folder: Path) -> dict[str, Any]:
    """Facts of genai_config.json, which ONNX Runtime GenAI trusts over the graph."""
    model = read_json(inside(folder, GENAI_CONFIG)).get("model", {})
    decoder = model.get("decoder", {})
    facts = {name: {**decoder, **model}.get(key, ABSENT) for name, key in GENAI_SIZES.items()}
    facts |= {"BOS id": model.get("bos_token_id"), "ends at": _as_list(model.get("eos_token_id"))}
    return {f"genai {name}": value for name, value in facts.items()}


def expected_generation_ends(checkpoint: Path, config: Mapping[str, Any]) -> list[int]:
    """End-of-generation ids as Transformers' generate sees them."""
    path = checkpoint / "generation_config.json"
    generation = read_json(inside(checkpoint, path.name)) if path.exists() else {}
    return _as_list(generation.get("eos_token_id", config.get("eos_token_id")))


def _frequencies(contents: OnnxContents) -> NDArray[np.float64] | str:
    """Radians per position read from row 1 of the cos/sin tables, if every other row follows from them."""
    names = [_table_name(contents.model.graph, index) for index in (7, 8)]
    if "" in names:
        return ABSENT
    cos, sin = (contents.tensor(name).astype(np.float64) for name in names)  # (context, head size / 2)
    if cos.ndim != 2 or cos.shape != sin.shape or len(cos) < 2:
        return f"tables of shapes {cos.shape} and {sin.shape}"
    frequencies = np.arctan2(sin[1], cos[1])
    angles = np.arange(len(cos))[:, None] * frequencies
    allowed = TABLE_ERROR + TABLE_ERROR_PER_RADIAN * angles
    wrong = np.flatnonzero(((np.abs(np.cos(angles) - cos) > allowed) | (np.abs(np.sin(angles) - sin) > allowed)).any(1))
    return f"row {wrong[0]} of the cos/sin table does not follow from row 1" if wrong.size else frequencies


def _table_name(graph: Any, index: int) -> str:
    """The one initializer that feeds input `index` of every attention node; "" when there is none or several."""
    found = {node.input[index] for node in graph.node if node.op_type == ATTENTION and len(node.input) > index}
    initializers = {tensor.name for tensor in graph.initializer}
    return next(iter(found)) if len(found) == 1 and found <= initializers else ""


def _single(values: Any) -> Any:
    found = sorted({value for value in values if value is not None})
    return found[0] if len(found) == 1 else found


def _as_list(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value or [])
