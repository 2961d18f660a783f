"""ONNX Runtime on an ONNX folder: contents and facts of the graph, its exact variant, an export like it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.differences import ABSENT
from qalora_export.checkpoint.generation import GENERATION, Generation, generation_config, generation_of
from qalora_export.errors import InputError
from qalora_export.formats.account import Account
from qalora_export.formats.onnx.account import account_onnx
from qalora_export.formats.onnx.exact import exact_variant
from qalora_export.formats.onnx.hosts import CONFIG, web_config
from qalora_export.formats.onnx.layout import FLAT_GRAPH, TOKENIZER_CONFIG, graph_name
from qalora_export.formats.onnx.read import OnnxContents, read_back
from qalora_export.models.families import family_of
from qalora_export.models.loading import load_tokenizer
from qalora_export.safety import HashFile, inside, read_json
from qalora_export.verify.kernels import mlas
from qalora_export.verify.kernels.products import TappedGraph
from qalora_export.verify.probes.behaviour import BehaviourProbes, decoded
from qalora_export.verify.probes.probe_set import rendered
from qalora_export.verify.runtimes.facts import NOT_CARRIED, expected_graph_facts, expected_text_facts
from qalora_export.verify.runtimes.onnx_dequantize import runtime_dequantized
from qalora_export.verify.runtimes.record import Artifact, Facts, Matrices, RuntimeRecord, register

NORMS = ("RMSNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")
ATTENTION = "GroupQueryAttention"
EMBEDDING = "model.embed_tokens.weight"
WEB_FACTS = (CONFIG, GENERATION, "chat template for transformers.js")
# A float32 angle of p radians is right to p·2^-24; tables are made by different float32 routines.
TABLE_ERROR, TABLE_ERROR_PER_RADIAN = 1e-6, 2.0**-21


@register
class OnnxRuntime(RuntimeRecord):
    name = "onnxruntime"
    format = "onnx"
    dequantizer = "ONNX Runtime on the file's own nodes and an identity"
    own_tokenizer = False
    taps_of = "onnxruntime"

    def read_back(self, artifact: Path) -> OnnxContents:
        """By the onnx package."""
        return read_back(artifact)

    def dequantized(self, artifact: Path, workdir: Path) -> Matrices:
        return runtime_dequantized(artifact, workdir)

    def expected(self, checkpoint: CanonicalCheckpoint, frequencies: NDArray[Any]) -> Facts:
        scale = np.float32(family_of(checkpoint.config).attention_scale(checkpoint.config))
        facts = expected_graph_facts(checkpoint.config, frequencies, "onnx") | expected_text_facts(checkpoint.path)
        return facts | {"attention scale": scale} | expected_web_facts(checkpoint, facts["chat template"])

    def found(self, artifact: Path, contents: Any) -> Facts:
        return graph_facts(contents) | _tokenizer_facts(artifact) | web_facts(artifact)

    def account(self, checkpoint: CanonicalCheckpoint, artifact: Path, contents: Any, hash_of: HashFile) -> Account:
        return account_onnx(checkpoint, contents, hash_of=hash_of)

    def shipped(self, artifact: Path) -> Artifact:
        return Artifact(artifact)

    def tapped_graph(self, shipped: Artifact, checkpoint: CanonicalCheckpoint, workdir: Path) -> TappedGraph:
        return mlas.tapped_graph(shipped.path, checkpoint, workdir)

    def exact(self, artifact: Path, workdir: Path) -> Artifact:
        return Artifact(exact_variant(artifact, workdir / "exact"))

    def expected_defaults(self, generation: Generation, config: Mapping[str, Any]) -> dict[str, Any]:
        return _sampling(generation)

    def lost_settings(self, generation: Generation) -> tuple[str, ...]:
        return ()  # the folder has the whole generation_config.json

    def text_behaviour(self, artifact: Path, probes: BehaviourProbes, said: Mapping[str, Any]) -> dict[str, Any]:
        """By the tokenizer files of the folder, as transformers.js has them."""
        tokenizer, asked = load_tokenizer(artifact), probes.request
        rows = [[asked.anchor, index, asked.anchor] for index in range(asked.vocabulary)]
        sequences = [[*row] for row in asked.sequences]
        return {
            "pieces": {"hidden": decoded(tokenizer, rows, hide=True), "shown": decoded(tokenizer, rows, hide=False)},
            "decoded": decoded(tokenizer, sequences, hide=True),
            "unprompted": [rendered(tokenizer, chat, generation_prompt=False) for chat in asked.unprompted],
            "defaults": _sampling(generation_of(artifact, {})),
        }


def _sampling(generation: Generation) -> dict[str, Any]:
    return {name: value for name, value in asdict(generation).items() if name != "ends"}


def expected_web_facts(checkpoint: CanonicalCheckpoint, template: Any) -> Facts:
    """What steers transformers.js beside the graph. template: the tokenizer's chat template."""
    generation = generation_config(checkpoint.path, checkpoint.config)
    return dict(zip(WEB_FACTS, (web_config(checkpoint.config), generation, template), strict=True))


def web_facts(folder: Path) -> Facts:
    """The same by the folder's files. The layout of earlier versions has none, and transformers.js cannot load it."""
    if graph_name(folder) == FLAT_GRAPH and not (folder / CONFIG).exists():
        return dict.fromkeys(WEB_FACTS, NOT_CARRIED)
    config, generation, tokenizer = (_table(folder, name) for name in (CONFIG, GENERATION, TOKENIZER_CONFIG))
    return dict(zip(WEB_FACTS, (config, generation, tokenizer.get("chat_template")), strict=True))


def _table(folder: Path, name: str) -> dict[str, Any]:
    found = read_json(inside(folder, name)) if (folder / name).exists() else {}
    return found if isinstance(found, dict) else {}


def _tokenizer_facts(folder: Path) -> Facts:
    """Text facts of the tokenizer files in an ONNX folder; files that do not load leave every fact absent."""
    try:
        return expected_text_facts(folder)
    except InputError:
        return {}


def graph_facts(contents: OnnxContents) -> dict[str, Any]:
    """Facts that the graph itself computes with; a value that differs between nodes is reported as a list."""
    graph = contents.model.graph
    attributes = [(node.op_type, {a.name: _attribute(a) for a in node.attribute}) for node in graph.node]
    attention = [values for kind, values in attributes if kind == ATTENTION]
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    heads = _single(a.get("num_heads") for a in attention)
    windows = _windows(a for kind, a in attributes if kind == ATTENTION)
    everywhere = [index for index in range(len(attention)) if not windows or not windows[index]]
    embedding = contents.shape(EMBEDDING) if EMBEDDING in contents.others else (ABSENT,)
    table_name = _table_name(graph, 7, everywhere or list(range(len(attention))))
    table = shapes.get(table_name, [ABSENT, ABSENT])
    return {
        "vocabulary": embedding[0],
        "hidden size": embedding[-1],
        "layers": len(attention),
        "attention heads": heads,
        "key/value heads": _single(a.get("kv_num_heads") for a in attention),
        "head size": _head_size(graph),
        "context length": table[0],
        "norm epsilon": _single(a.get("epsilon", 1e-5) for kind, a in attributes if kind in NORMS),
        "attention scale": _single(a.get("scale") for a in attention),
        "RoPE frequencies": _frequencies(contents, everywhere or list(range(len(attention)))),
        "RoPE magnitude": float(contents.tensor(table_name)[0, 0]) if table_name in contents.initializers else ABSENT,
        "attention windows": windows,
        "RoPE frequencies in windows": _frequencies(contents, [index for index, size in enumerate(windows) if size]),
    }


def _head_size(graph: Any) -> Any:
    """Features of a head, by the last dimension of the KV cache."""
    caches = [value.type.tensor_type.shape.dim for value in graph.input if value.name.startswith("past_key_values.")]
    return _single(dims[-1].dim_value for dims in caches if dims)


def _windows(attention: Iterable[Mapping[str, Any]]) -> list[int]:
    """local_window_size of each layer, in the order of the graph; empty when every layer sees everything."""
    found = [values.get("local_window_size", 0) for values in attention]
    sizes = [max(0, size) if isinstance(size, int) else size for size in found]
    return sizes if any(sizes) else []


def _frequencies(contents: OnnxContents, layers: list[int]) -> NDArray[np.float64] | str:
    """Radians per position read from row 1 of the layers' cos/sin tables, if every other row follows from them."""
    names = [_table_name(contents.model.graph, index, layers) for index in (7, 8)]
    if "" in names:
        return ABSENT
    cos, sin = (contents.tensor(name).astype(np.float64) for name in names)  # (context, head size / 2)
    if cos.ndim != 2 or cos.shape != sin.shape or len(cos) < 2:
        return f"tables of shapes {cos.shape} and {sin.shape}"
    frequencies, magnitude = np.arctan2(sin[1], cos[1]), cos[0, 0]
    angles = np.arange(len(cos))[:, None] * frequencies
    allowed = np.abs(magnitude) * (TABLE_ERROR + TABLE_ERROR_PER_RADIAN * angles)
    off = np.abs(magnitude * np.cos(angles) - cos), np.abs(magnitude * np.sin(angles) - sin)
    wrong = np.flatnonzero(((off[0] > allowed) | (off[1] > allowed)).any(1))
    return f"row {wrong[0]} of the cos/sin table does not follow from row 1" if wrong.size else frequencies


def _table_name(graph: Any, index: int, layers: list[int]) -> str:
    """The one initializer that feeds input `index` of the layers' attention nodes; "" when there is none or several."""
    nodes = [node for node in graph.node if node.op_type == ATTENTION]
    found = {nodes[layer].input[index] for layer in layers if len(nodes[layer].input) > index}
    initializers = {tensor.name for tensor in graph.initializer}
    return next(iter(found)) if len(found) == 1 and found <= initializers else ""


def _single(values: Any) -> Any:
    found = {repr(value): value for value in values if value is not None}  # a list where a number should be has no hash
    return next(iter(found.values())) if len(found) == 1 else [found[key] for key in sorted(found)]


def _attribute(attribute: Any) -> Any:
    """Its value, whatever its type says it is; ABSENT for a type that ONNX does not have."""
    import onnx

    try:
        return onnx.helper.get_attribute_value(attribute)
    except ValueError:
        return ABSENT
